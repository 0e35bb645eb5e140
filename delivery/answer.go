package delivery

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// finish turns an answer into the result and makes its connection reusable if the body is short. keep is for the body of a success, as far as it is read.
func (c *Client) finish(resp *http.Response, res *Result, keep bool) {
	defer func() { _ = resp.Body.Close() }()
	res.Status, res.Class = resp.StatusCode, classOfStatus(resp.StatusCode)
	res.Directive = c.directive(resp.Header.Get(headerDelivery))
	buf, _ := c.bodies.Get().(*[maxResponseBytes]byte)
	defer c.bodies.Put(buf)
	n := 0
	if resp.StatusCode != http.StatusSwitchingProtocols { // its body is the bare connection, which no timeout ends
		n = readBody(resp.Body, buf[:])
	}
	if res.OK() {
		if keep {
			res.Body = bytes.Clone(buf[:n])
		}
		return
	}
	res.Err = describeStatus(resp.StatusCode)
	res.RetryAfter = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
	if keep := min(n, c.live.Load().keepResponseBytes); keep > 0 {
		res.Body = bytes.Clone(buf[:keep])
	}
}

// headerDelivery is where a receiver gives directives. The key is in canonical form, to be found without a conversion.
const headerDelivery = "Webhook-Delivery"

func (c *Client) directive(value string) Directive {
	if value == "" {
		return DirectiveNone
	}
	switch l := c.live.Load(); {
	case l.receiverDisable && strings.EqualFold(strings.TrimSpace(value), "disable"):
		return DirectiveDisable
	case l.receiverAbort && strings.EqualFold(strings.TrimSpace(value), "abort-message"):
		return DirectiveAbort
	}
	return DirectiveNone
}

// drain reads away the body of an answer that leads on.
func (c *Client) drain(resp *http.Response) {
	defer func() { _ = resp.Body.Close() }()
	buf, _ := c.bodies.Get().(*[maxResponseBytes]byte)
	readBody(resp.Body, buf[:])
	c.bodies.Put(buf)
}

// readBody reads until the end, an error or a full buf, and returns how much there was. A connection whose body was not read to its end
// is closed by net/http, which is the way out of an endless one.
func readBody(body io.Reader, buf []byte) int {
	n := 0
	for n < len(buf) {
		more, err := body.Read(buf[n:])
		n += more
		if err != nil {
			break
		}
	}
	return n
}

func describeStatus(status int) string {
	text := "answered " + strconv.Itoa(status)
	if status >= 300 && status <= 399 {
		text += ", not followed"
	}
	return text
}
