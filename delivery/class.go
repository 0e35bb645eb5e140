// Package delivery makes webhook requests: the body of an event, its signature, one guarded attempt, and the class of what came of it.
// It knows no database and does not decide when to try again.
package delivery

import (
	"net/http"
	"slices"
	"time"
)

// Class is what an attempt led to: a closed set that metrics, retry, breaker and the attempts table share.
type Class string

// The classes. Only ClassSuccess is a delivery.
const (
	ClassSuccess  Class = "success"  // 2xx
	ClassGone     Class = "gone"     // 410: the receiver wants no more of this endpoint
	Class3xx      Class = "http_3xx" // a redirect that was not followed
	Class4xx      Class = "http_4xx" // any 4xx but 410 and 429
	Class429      Class = "http_429"
	Class5xx      Class = "http_5xx"
	ClassTimeout  Class = "timeout"  // no complete answer head within the endpoint's timeout, or no connection within the configured one
	ClassDNS      Class = "dns"      // the host name did not resolve
	ClassConnect  Class = "connect"  // refused or unreachable
	ClassTLS      Class = "tls"      // handshake or certificate
	ClassReset    Class = "reset"    // the connection ended before the answer
	ClassProtocol Class = "protocol" // an answer that is not HTTP, or not one of the above
	ClassDenied   Class = "denied"   // the operator's configuration forbids the request
	ClassInvalid  Class = "invalid"  // no request could be made of the endpoint and the message
	ClassLocal    Class = "local"    // this machine could not: no descriptor, memory or connection slot is free; says nothing about the receiver
	ClassCanceled Class = "canceled" // the caller's context ended first; says nothing about the receiver
)

// Classes returns all classes.
func Classes() []Class {
	return []Class{
		ClassSuccess, ClassGone, Class3xx, Class4xx, Class429, Class5xx, ClassTimeout, ClassDNS, ClassConnect, ClassTLS,
		ClassReset, ClassProtocol, ClassDenied, ClassInvalid, ClassLocal, ClassCanceled,
	}
}

// Retryable reports whether another attempt may do better: all failures but gone, denied and invalid.
func (c Class) Retryable() bool {
	return !slices.Contains([]Class{ClassSuccess, ClassGone, ClassDenied, ClassInvalid}, c)
}

// Result is what one attempt led to.
type Result struct {
	Class Class
	// Status is the answer's status code; zero if there was no answer.
	Status int
	// Err says in words what was wrong, empty on success. It never holds a URL, a payload, a secret or bytes of the answer.
	Err string
	// RetryAfter is what a failing answer's Retry-After asks for, not capped; zero if it asks for nothing.
	RetryAfter time.Duration
	Started    time.Time
	Duration   time.Duration
	// Connected is when, from Started, there was a connection for the last request: after waiting for one, or looking up, connecting and shaking hands; and
	// Answered when the first byte of its answer had come. Zero: that was never so.
	Connected, Answered time.Duration
	// Reused tells whether that connection had been used before.
	Reused bool
	// Body is the beginning of a failing answer's body, at most Config.KeepResponseBytes. The caller owns it.
	Body []byte
	// Directive is what the answer asks for beyond its status, as far as the configuration lets it.
	Directive Directive
	// Signature is the value sent under the endpoint's signature header; empty if its secret is asymmetric.
	Signature string
}

// Directive is what a receiver asks for by the answer header webhook-delivery (https://docs.svix.com/receiving/delivery-control).
type Directive uint8

// The directives.
const (
	DirectiveNone    Directive = iota
	DirectiveDisable           // send nothing more to this endpoint
	DirectiveAbort             // no more attempts for this delivery, if it has failed
)

// OK reports whether the receiver took the delivery.
func (r *Result) OK() bool { return r.Class == ClassSuccess }

func classOfStatus(status int) Class {
	switch {
	case status == http.StatusGone:
		return ClassGone
	case status == http.StatusTooManyRequests:
		return Class429
	case status >= 200 && status <= 299:
		return ClassSuccess
	case status >= 300 && status <= 399:
		return Class3xx
	case status >= 400 && status <= 499:
		return Class4xx
	case status >= 500 && status <= 599:
		return Class5xx
	default:
		return ClassProtocol
	}
}
