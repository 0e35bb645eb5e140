package delivery

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"hash"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The prefixes of tokens that Standard Webhooks knows; the private one may also hold the public half behind the seed.
const (
	secretPrefix  = "whsec_"
	privatePrefix = "whsk_"
	publicPrefix  = "whpk_"
)

// secret signs with one key. A keyed hash is kept for the next signature, or the key would be hashed again for every attempt; with many endpoints that would be
// most of what a signature costs, as a pool is emptied every few seconds.
type secret struct {
	last    atomic.Pointer[macState] // unless it is in use
	others  sync.Pool                // of *macState, where there is more than one signature at a time
	private ed25519.PrivateKey       // nil: HMAC
}

// macState is a keyed hash with the memory for its sum.
type macState struct {
	mac hash.Hash
	sum []byte
}

func newSecret(key []byte) *secret {
	return &secret{others: sync.Pool{New: func() any {
		return &macState{mac: hmac.New(sha256.New, key), sum: make([]byte, 0, sha256.Size)}
	}}}
}

// parseSecret makes the secret of the Standard Webhooks signature out of a token, or says what would do. A token whsec_<base64> is decoded,
// whsk_<base64> is an ed25519 key, any other is used as it is. What follows whsec_ and is not standard base64 makes it an "other": official
// verifiers cannot read such a token, but receivers of the older header, which takes the token as it is, still can.
func parseSecret(token string) (s *secret, remedy string) {
	if encoded, ok := strings.CutPrefix(token, privatePrefix); ok {
		key, ok := parsePrivate(encoded)
		if !ok {
			return nil, "is no private key of ed25519: use whsk_ and its seed of 32 bytes, or seed and public key, in base64"
		}
		return &secret{private: key}, ""
	}
	if strings.HasPrefix(token, publicPrefix) {
		return nil, "is a public key, which is for the receiver: use the private one, whsk_…"
	}
	key := []byte(token)
	if encoded, ok := strings.CutPrefix(token, secretPrefix); ok {
		if decoded, err := base64.StdEncoding.DecodeString(encoded); err == nil {
			key = decoded
		}
	}
	if len(key) == 0 {
		return nil, "must not be empty: use whsec_ and 24 to 64 random bytes in base64"
	}
	return newSecret(key), ""
}

func parsePrivate(encoded string) (ed25519.PrivateKey, bool) {
	raw, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || len(raw) != ed25519.SeedSize && len(raw) != ed25519.PrivateKeySize {
		return nil, false
	}
	key := ed25519.NewKeyFromSeed(raw[:ed25519.SeedSize])
	return key, bytes.HasPrefix(key, raw) // a public half of another key would give the seed away in its signatures
}

// sign adds the signature over prefix and body to dst, with the name of its scheme.
func (s *secret) sign(dst, prefix, body []byte) []byte {
	if s.private != nil {
		return base64.StdEncoding.AppendEncode(append(dst, "v1a,"...), ed25519.Sign(s.private, slices.Concat(prefix, body)))
	}
	return s.mac(append(dst, "v1,"...), prefix, body, base64.StdEncoding.AppendEncode)
}

// mac adds HMAC-SHA256 over prefix and body to dst through encode, which appends text.
func (s *secret) mac(dst, prefix, body []byte, encode func(dst, sum []byte) []byte) []byte {
	st := s.last.Swap(nil)
	if st == nil {
		st, _ = s.others.Get().(*macState)
	}
	st.mac.Reset()
	st.mac.Write(prefix)
	st.mac.Write(body)
	st.sum = st.mac.Sum(st.sum[:0])
	dst = encode(dst, st.sum)
	if !s.last.CompareAndSwap(nil, st) {
		s.others.Put(st)
	}
	return dst
}

// signing is the memory for what is signed and for the signatures of one attempt.
type signing struct{ in, out []byte }

var signings = sync.Pool{New: func() any { return new(signing) }} //nolint:gochecknoglobals // memory to be used again

// signatures are the header values that change from attempt to attempt.
type signatures struct {
	id, timestamp, v1 string
	legacy            string // empty: there is none
}

// sign signs m as sent at now. During a rotation v1 carries one signature per valid secret, separated by a space. The older header is made with
// the primary token; an asymmetric one is no secret that its receiver has, so that there is none.
func (ep *Endpoint) sign(m *Message, now time.Time) signatures {
	st, _ := signings.Get().(*signing)
	defer signings.Put(st)

	st.in, _ = m.ID.AppendText(st.in[:0])
	idLen := len(st.in)
	st.in = strconv.AppendInt(append(st.in, '.'), now.Unix(), 10)
	timeEnd := len(st.in)
	st.in = append(st.in, '.')

	out := append(st.out[:0], st.in[:timeEnd]...) //nolint:gocritic // st.out gets it back at the end
	out = ep.primary.sign(out, st.in, m.Body)
	if ep.secondary != nil && (ep.secondaryExpires.IsZero() || now.Before(ep.secondaryExpires)) {
		out = ep.secondary.sign(append(out, ' '), st.in, m.Body)
	}
	legacy := len(out)
	if ep.legacy != nil {
		out = ep.legacy.mac(append(out, "sha256="...), nil, m.Body, hex.AppendEncode)
	}
	st.out = out

	all := string(out) // one allocation for all values
	return signatures{id: all[:idLen], timestamp: all[idLen+1 : timeEnd], v1: all[timeEnd:legacy], legacy: all[legacy:]}
}
