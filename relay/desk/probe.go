package desk

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// TestEvent is the type of the event that a probe sends.
const TestEvent = "outbox_relay.endpoint.test"

// ProbeResult is what came of a test event.
type ProbeResult struct {
	EventID   outbox.UUID    `json:"event_id"`
	URL       string         `json:"url"`
	Delivered bool           `json:"delivered"`
	Class     delivery.Class `json:"class"`
	Status    int            `json:"status_code,omitempty"`
	TookMS    int64          `json:"took_ms"`
	Error     string         `json:"error,omitempty"`
	Answer    string         `json:"answer,omitempty"` // the beginning of its body
	Hint      string         `json:"hint,omitempty"`
}

// Probe sends one signed test event to the endpoint of the row. Nothing of it is recorded.
func Probe(ctx context.Context, client *delivery.Client, row delivery.EndpointRow, defaults delivery.Defaults, source string) (*ProbeResult, error) {
	ep, err := delivery.NewEndpoint(row, defaults)
	if err != nil {
		return nil, &Error{Op: "test endpoint", Err: fmt.Errorf("its row cannot be used:\n%w", err), hint: "mend the columns named; the relay leaves the endpoint alone until then"}
	}
	data, err := json.Marshal(map[string]any{"endpoint_id": ep.ID, "message": "This is a test. Nothing has happened."})
	if err != nil {
		return nil, fmt.Errorf("encode test event: %w", err)
	}
	e := outbox.Event{
		ID: outbox.NewUUID(), Type: TestEvent, Name: "Test of a webhook endpoint", AggregateID: ep.ID, AggregateType: "webhook_endpoint",
		AggregateVersion: 1, ContextID: row.ContextID, Data: data, Metadata: json.RawMessage("{}"), OccurredAt: time.Now().UTC().Truncate(time.Microsecond),
	}
	m := delivery.Encode(nil, ep.Format, &e, source)
	res := client.Attempt(ctx, ep, &m, 1)
	p := &ProbeResult{
		EventID: e.ID, URL: ep.URL, Delivered: res.OK(), Class: res.Class, Status: res.Status, TookMS: res.Duration.Milliseconds(),
		Error: res.Err, Answer: string(res.Body), Hint: probeHint(res.Class, res.Status, ep),
	}
	return p, nil
}

func probeHint(class delivery.Class, status int, ep *delivery.Endpoint) string {
	switch class {
	case delivery.ClassSuccess, delivery.ClassCanceled:
		return ""
	case delivery.ClassGone:
		return "the receiver wants no more: a real event would have disabled the endpoint"
	case delivery.Class3xx:
		return "the redirect was not followed: put the final address into endpoint_url, or set follow_redirects if the error names no key of network"
	case delivery.Class429:
		return "the receiver wants fewer requests: lower rate_limit_per_second or max_concurrency"
	case delivery.Class5xx:
		return "the receiver has a fault of its own: look into its log for the event's id"
	case delivery.ClassTimeout:
		return fmt.Sprintf("there was no answer within %v: answer first and work afterwards, raise timeout_seconds, or look for a firewall", ep.Timeout)
	case delivery.ClassDNS:
		return "check the host name in endpoint_url, and that this machine resolves it"
	case delivery.ClassLocal:
		return "the machine of this command has run out of something, which says nothing about the receiver"
	case delivery.ClassConnect:
		return "check host and port in endpoint_url, that the receiver runs and that no firewall is in between"
	case delivery.ClassTLS:
		return "check the receiver's certificate: its names, its end and the chain it sends"
	case delivery.ClassReset:
		return "the receiver closed the connection before it answered: look into its log, and at proxies in between"
	case delivery.ClassProtocol:
		return "what answers there does not speak HTTP as it should: check the port, and http or https"
	case delivery.ClassDenied:
		return "change what the error names, if it shall be reached: an address that is not public belongs into network.allow"
	case delivery.ClassInvalid:
		return "check the endpoint's row: headers and address"
	case delivery.Class4xx:
	}
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return "check that the receiver verifies with this endpoint's secret and allows the clock to be a few minutes off"
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		return "check the path in endpoint_url, and http_method"
	case http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType:
		return "check payload_format, and what the receiver accepts"
	}
	return "the receiver refuses the request: look into its log for the event's id"
}
