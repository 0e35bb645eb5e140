package delivery

import (
	"context"
	"encoding/base64"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// requestHead is the beginning of every request to an endpoint that http1 may send: the request line, Host, and what the endpoint's row adds.
// Empty: it may send none.
func (ep *Endpoint) requestHead() []byte {
	if ep.url == nil || strings.Contains(ep.url.Host, "%") { // the zone of an IPv6 address is not sent
		return nil
	}
	b := append([]byte(ep.Method), ' ')
	b = append(append(b, ep.url.RequestURI()...), " HTTP/1.1\r\n"...)
	b = appendHeader(b, "Host", ep.url.Host)
	user := ep.url.User
	for _, f := range ep.custom {
		if f.name == "Authorization" && user != nil { // as net/http does: one that is empty gives way
			if f.values[0] == "" {
				continue
			}
			user = nil
		}
		for _, v := range f.values {
			b = appendHeader(b, f.name, textproto.TrimString(v))
		}
	}
	if user != nil {
		b = appendHeader(b, "Authorization", basicAuth(user))
	}
	return slices.Clip(b)
}

func basicAuth(u *url.Userinfo) string {
	password, _ := u.Password()
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password))
}

func appendHeader(b []byte, name, value string) []byte {
	b = append(append(b, name...), ": "...)
	return append(append(b, value...), "\r\n"...)
}

// small returns the http1 that sends m to ep; nil: net/http does.
func (c *Client) small(ep *Endpoint, m *Message) *http1 {
	switch {
	case c.plain == nil || len(ep.head) == 0 || len(m.Body) > http1MaxBody:
		return nil
	case ep.url.Scheme == "http":
		return c.plain
	default:
		return c.profileOf(ep).road(ep.verifyTLS, false).small()
	}
}

// sendSmall makes one request through t, or two if the first met a dead kept connection. It is what header and send are for net/http. See
// http1.send for what it returns.
func (c *Client) sendSmall(
	ctx context.Context, t *http1, deadline time.Time, sent *exchange, ep *Endpoint, m *Message, attempt int, s signatures,
) (status int, resp *http.Response, err error) {
	buf, _ := c.requests.Get().(*[]byte)
	defer c.requests.Put(buf)
	*buf = c.appendRequest((*buf)[:0], ep, m, attempt, s)
	status, resp, err = t.send(ctx, ep.Host, deadline, *buf, ep.like, sent)
	if err != nil && sent.resend(ctx, err) {
		status, resp, err = t.send(ctx, ep.Host, deadline, *buf, ep.like, sent)
	}
	if resp != nil {
		hideLocation(resp)
	}
	return status, resp, err
}

// appendRequest appends a whole request. Its parts have been checked: no name or value can end its line.
func (c *Client) appendRequest(b []byte, ep *Endpoint, m *Message, attempt int, s signatures) []byte {
	b = append(b, ep.head...)
	b = appendHeader(b, "User-Agent", c.userAgent[0])
	b = strconv.AppendInt(append(b, "Content-Length: "...), int64(len(m.Body)), 10)
	b = appendHeader(append(b, "\r\n"...), "Content-Type", m.ContentType)
	b = appendHeader(b, headerID, s.id)
	b = appendHeader(b, headerTimestamp, s.timestamp)
	b = strconv.AppendInt(append(b, headerAttempt+": "...), int64(attempt), 10)
	b = appendHeader(append(b, "\r\n"...), headerSignature, s.v1)
	if s.legacy != "" {
		b = appendHeader(b, ep.signatureHeader, s.legacy)
	}
	for _, f := range m.Header {
		b = appendHeader(b, f.Name, textproto.TrimString(f.Value))
	}
	return append(append(b, "\r\n"...), m.Body...)
}
