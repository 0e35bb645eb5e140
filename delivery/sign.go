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
	"time"
)

// The prefixes of tokens that Standard Webhooks knows; the private one may also hold the public half behind the seed.
const (
	secretPrefix  = "whsec_"
	privatePrefix = "whsk_"
	publicPrefix  = "whpk_"
)

// secret signs with one key. The keyed hash states are kept, so that the key is not hashed again for every attempt.
type secret struct {
	states  sync.Pool          // of *macState
	private ed25519.PrivateKey // nil: HMAC
}

// macState is a keyed hash with the memory for one attempt's signatures.
type macState struct {
	mac hash.Hash // nil of an asymmetric key
	sum []byte
	in  []byte
	out []byte
}

func newSecret(key []byte) *secret {
	return &secret{states: sync.Pool{New: func() any {
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
		return &secret{private: key, states: sync.Pool{New: func() any { return new(macState) }}}, ""
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
	st, _ := s.states.Get().(*macState)
	defer s.states.Put(st)
	return st.append(append(dst, "v1,"...), prefix, body, base64.StdEncoding.AppendEncode)
}

// append adds HMAC-SHA256 over prefix and body to dst through encode, which appends text.
func (s *macState) append(dst, prefix, body []byte, encode func(dst, sum []byte) []byte) []byte {
	s.mac.Reset()
	s.mac.Write(prefix)
	s.mac.Write(body)
	s.sum = s.mac.Sum(s.sum[:0])
	return encode(dst, s.sum)
}

// signatures are the header values that change from attempt to attempt.
type signatures struct {
	id, timestamp, v1 string
	legacy            string // empty: there is none
}

// sign signs m as sent at now. During a rotation v1 carries one signature per valid secret, separated by a space. The older header is made with
// the primary token; an asymmetric one is no secret that its receiver has, so that there is none.
func (ep *Endpoint) sign(m *Message, now time.Time) signatures {
	st, _ := ep.primary.states.Get().(*macState)
	defer ep.primary.states.Put(st)

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
		raw, _ := ep.legacy.states.Get().(*macState)
		out = raw.append(append(out, "sha256="...), nil, m.Body, hex.AppendEncode)
		ep.legacy.states.Put(raw)
	}
	st.out = out

	all := string(out) // one allocation for all values
	return signatures{id: all[:idLen], timestamp: all[idLen+1 : timeEnd], v1: all[timeEnd:legacy], legacy: all[legacy:]}
}
