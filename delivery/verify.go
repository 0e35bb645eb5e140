package delivery

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
)

// How an endpoint is verified.
const (
	VerifyNone      = "none"      // not by the relay
	VerifyHead      = "head"      // its receiver answers HEAD with 2xx, which is what neo-commons asks for
	VerifyChallenge = "challenge" // its receiver sends back what it was sent in an event of type VerifyEvent
)

// VerifyEvent is the type of the event that carries a challenge.
const VerifyEvent = "outbox_relay.endpoint.verify"

// Verification is what one try to verify an endpoint has led to.
type Verification struct {
	OK bool
	// Result is that of the request. Of a receiver that took it and did not send the challenge back, the class is ClassSuccess, and Body the beginning of what
	// it sent.
	Result Result
	// Reason says in words why not, as Result.Err does; empty if OK.
	Reason string
}

// Verify asks the receiver of an endpoint once, active or not, whether it wants what is sent there: by VerifyHead, or else by VerifyChallenge. The request is like
// that of an attempt, with its signature, within the same timeout, and goes the same guarded way. No attempt is counted.
func (c *Client) Verify(ctx context.Context, ep *Endpoint, how, source string) Verification {
	asked := *ep
	asked.head = nil // for http1 knows no HEAD, and does not keep the answer of a success
	var m Message
	challenge := rand.Text()
	if how == VerifyHead {
		asked.Method = http.MethodHead
		m = Message{ID: outbox.NewUUID(), ContentType: contentTypeJSON}
	} else {
		asked.keepAnswer = true
		m = Encode(nil, ep.Format, challengeEvent(ep, challenge), source)
	}
	v := Verification{Result: Result{Started: time.Now()}}
	res := &v.Result
	c.deliver(ctx, &asked, &m, 1, res)
	res.Duration = time.Since(res.Started)
	switch {
	case !res.OK():
		v.Reason = res.Err
	case how == VerifyHead || echoes(res.Body, challenge) && !sameJSON(res.Body, m.Body): // what sends back all it gets has understood nothing
		v.OK, res.Body = true, nil
	default:
		v.Reason = fmt.Sprintf("answered %d, but did not send the challenge back", res.Status)
		res.Body = bytes.Clone(res.Body[:min(len(res.Body), c.live.Load().keepResponseBytes)])
	}
	return v
}

// sameJSON tells whether two documents are the same but for white space.
func sameJSON(a, b []byte) bool {
	var x, y bytes.Buffer
	return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}

// challengeEvent is the event that a challenge comes in. It is in no table.
func challengeEvent(ep *Endpoint, challenge string) *outbox.Event {
	return &outbox.Event{
		ID: outbox.NewUUID(), Type: VerifyEvent, Name: "Verification of a webhook endpoint", AggregateID: ep.ID, AggregateType: "webhook_endpoint",
		AggregateVersion: 1, Data: fmt.Appendf(nil, `{"challenge": %q, "endpoint_id": %q}`, challenge, ep.ID), Metadata: json.RawMessage("{}"),
		OccurredAt: time.Now().UTC().Truncate(time.Microsecond),
	}
}

// echoes tells whether an answer sends the challenge back: {"challenge": "…"}, or the text alone, which many frameworks put in quotes.
func echoes(answer []byte, challenge string) bool {
	answer = bytes.TrimSpace(answer)
	if string(answer) == challenge {
		return true
	}
	var text string
	if json.Unmarshal(answer, &text) == nil {
		return text == challenge
	}
	var object struct {
		Challenge string `json:"challenge"`
	}
	return json.Unmarshal(answer, &object) == nil && object.Challenge == challenge
}
