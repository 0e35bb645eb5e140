package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/outbox"
)

// post is what no outbox in Go on net/http can beat by much: all it does is to sign and to send.
type post struct{ *stage }

func newPost(_ context.Context, s *stage) (contender, error) { return post{s}, nil }

func (post) fill(context.Context, int) error { return nil }

func (p post) drain(ctx context.Context, n int) (drained, error) {
	c, err := child(ctx, rolePost, urlVar+"="+p.receiver.url, fmt.Sprintf("%s=%d", eventsVar, n))
	if err != nil {
		return drained{}, err
	}
	d, err := p.finish(ctx, c, n)
	return d, errors.Join(err, c.stop())
}

// postLoop is the role of the child: it sends n events and waits to be stopped.
func postLoop(ctx context.Context, url string, n int) error {
	s := newSender(url, workers)
	defer s.close()
	at := time.Now()
	var left atomic.Int64
	left.Store(int64(n))
	group, sending := errgroup.WithContext(ctx)
	for range workers {
		group.Go(func() error {
			var body []byte
			for left.Add(-1) >= 0 {
				id := outbox.NewUUID().String()
				// The buffer may be used again: the receiver answers when it has read all of the body.
				body = appendBody(body[:0], id, at, data)
				if _, err := s.post(sending, id, body); err != nil {
					return err
				}
			}
			return nil
		})
	}
	// The receiver counts an event before it answers, so that the last answer may still be under way when this is asked to end.
	if err := group.Wait(); err != nil && ctx.Err() == nil {
		return err
	}
	<-ctx.Done()
	return nil
}
