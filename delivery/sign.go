package delivery

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"hash"
	"strconv"
	"strings"
	"sync"
	"time"
)

const secretPrefix = "whsec_"

// secret signs with one key. The keyed hash states are kept, so that the key is not hashed again for every attempt.
type secret struct{ states sync.Pool }

// macState is a keyed hash with the memory for one attempt's signatures.
type macState struct {
	mac hash.Hash
	sum []byte
	in  []byte
	out []byte
}

func newSecret(key []byte) *secret {
	return &secret{states: sync.Pool{New: func() any {
		return &macState{mac: hmac.New(sha256.New, key), sum: make([]byte, 0, sha256.Size)}
	}}}
}

// signingKey is the key of the Standard Webhooks signature: a token whsec_<base64> is decoded, any other is used as it is. What follows
// the prefix and is not standard base64 makes it an "other": official verifiers cannot read such a token, but receivers of the older
// header, which takes the token as it is, still can.
func signingKey(token string) []byte {
	if encoded, ok := strings.CutPrefix(token, secretPrefix); ok {
		if key, err := base64.StdEncoding.DecodeString(encoded); err == nil {
			return key
		}
	}
	return []byte(token)
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
type signatures struct{ id, timestamp, v1, legacy string }

// sign signs m as sent at now. During a rotation v1 carries one signature per valid secret, separated by a space.
func (ep *Endpoint) sign(m *Message, now time.Time) signatures {
	st, _ := ep.primary.states.Get().(*macState)
	defer ep.primary.states.Put(st)

	st.in, _ = m.ID.AppendText(st.in[:0])
	idLen := len(st.in)
	st.in = strconv.AppendInt(append(st.in, '.'), now.Unix(), 10)
	timeEnd := len(st.in)
	st.in = append(st.in, '.')

	out := append(st.out[:0], st.in[:timeEnd]...) //nolint:gocritic // st.out gets it back at the end
	out = st.append(append(out, "v1,"...), st.in, m.Body, base64.StdEncoding.AppendEncode)
	if ep.secondary != nil && (ep.secondaryExpires.IsZero() || now.Before(ep.secondaryExpires)) {
		other, _ := ep.secondary.states.Get().(*macState)
		out = other.append(append(out, " v1,"...), st.in, m.Body, base64.StdEncoding.AppendEncode)
		ep.secondary.states.Put(other)
	}
	legacy := len(out)
	out = append(out, "sha256="...)
	if ep.legacy == ep.primary {
		out = st.append(out, nil, m.Body, hex.AppendEncode)
	} else {
		raw, _ := ep.legacy.states.Get().(*macState)
		out = raw.append(out, nil, m.Body, hex.AppendEncode)
		ep.legacy.states.Put(raw)
	}
	st.out = out

	all := string(out) // one allocation for all values
	return signatures{id: all[:idLen], timestamp: all[idLen+1 : timeEnd], v1: all[timeEnd:legacy], legacy: all[legacy:]}
}
