package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

// rotation is what endpoints rotate-secret was told.
type rotation struct {
	keep       time.Duration
	asymmetric bool
	file       string
	yes        bool
}

// rotated is what came of it.
type rotated struct {
	EndpointID outbox.UUID `json:"endpoint_id"`
	Secret     string      `json:"secret,omitempty"`     // made here, and shown this once
	PublicKey  string      `json:"public_key,omitempty"` // of an asymmetric secret, which nobody else needs
	OldUntil   desk.Time   `json:"old_secret_until,omitzero"`
	SealedWith string      `json:"sealed_with,omitempty"`
}

func (a *app) endpointsRotateSecretCommand() *cobra.Command {
	var q inquiry
	r := rotation{keep: 24 * time.Hour}
	cmd := &cobra.Command{
		Use:   "rotate-secret ENDPOINT",
		Short: "Give an endpoint a new secret; the old one goes on signing for a while",
		Long: `Give an endpoint a new secret. The old one becomes its second one: for the time of --expires every
request has a signature of each in webhook-signature, so that the receiver may change over whenever
it suits it within that time. The older header, signature_header, has room for one signature: that
of the new secret, from now on.

The new secret is made here and shown once, or it is read from --secret-file. With --asymmetric it
is a key pair (ed25519), of which the receiver gets the public half. Where secrets.keys has keys,
both secrets are stored sealed.

It needs UPDATE on the endpoint's secrets, which the role of the running relay does not have: use
the role that owns the tenant's tables. Not a superuser, where a tenant owns them or may put triggers
on them: these would run with its rights.`,
		Example: `  outbox-relay endpoints rotate-secret -t acme 0190c2f6-0000-7000-8000-000000000001
  outbox-relay endpoints rotate-secret -t acme 0190c2f6-0000-7000-8000-000000000001 --expires 7d --asymmetric
  vault kv get -field=secret hooks/acme | outbox-relay endpoints rotate-secret -t acme \
    0190c2f6-0000-7000-8000-000000000001 --secret-file -`,
		Args: oneID("endpoint"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.asymmetric && r.file != "" {
				return usage("--asymmetric makes a key, and --secret-file brings one: say one of the two")
			}
			token, err := a.newToken(cmd.Context(), &r)
			if err != nil {
				return err
			}
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, c *config) error {
				return a.rotate(ctx, &q, d, c, argument(args), &r, token)
			})
		},
	}
	q.addTo(cmd)
	flags := cmd.Flags()
	flags.Var(spanFlag(&r.keep), "expires", "how long the old secret goes on signing: `TIME` such as 24h or 7d; 0s ends it at once")
	flags.BoolVar(&r.asymmetric, "asymmetric", false, "make a key pair (ed25519, v1a) instead of a shared secret")
	flags.StringVar(&r.file, "secret-file", "", "take the new secret from this `FILE`, - for standard input")
	flags.BoolVarP(&r.yes, "yes", "y", false, "also if an even older secret still signs: that ends now")
	return cmd
}

// maxSecretFile is more than secret_token holds.
const maxSecretFile = 4096

// newToken makes the new secret, or reads it.
func (a *app) newToken(ctx context.Context, r *rotation) (string, error) {
	switch {
	case r.asymmetric:
		return delivery.NewPrivateKey(), nil
	case r.file == "":
		return delivery.NewSecret(), nil
	}
	text, err := unlessInterrupted(ctx, func() ([]byte, error) { return a.readSecret(r) })
	if err != nil {
		return "", err
	}
	token := strings.TrimRight(string(text), "\r\n")
	if fault := delivery.SecretFault(token); fault != "" {
		return "", usage("the secret in --secret-file %s", fault)
	}
	return token, nil
}

// readSecret may wait: for a person at a terminal, or for whoever writes into a pipe.
func (a *app) readSecret(r *rotation) ([]byte, error) {
	var from io.Reader = a.in
	if r.file != "-" {
		file, err := os.Open(r.file)
		if err != nil {
			return nil, fmt.Errorf("read the secret: %w", err)
		}
		defer file.Close() //nolint:errcheck // it was read only
		from = file
	}
	text, err := io.ReadAll(io.LimitReader(from, maxSecretFile))
	if err != nil {
		return nil, fmt.Errorf("read the secret: %w", err)
	}
	return text, nil
}

func (a *app) rotate(ctx context.Context, q *inquiry, d *desk.Desk, c *config, endpoint outbox.UUID, r *rotation, token string) error {
	keys, err := c.Secrets.Ring()
	if err != nil {
		return err
	}
	x := rotated{EndpointID: endpoint, PublicKey: delivery.PublicKey(token), SealedWith: keys.First()}
	if x.PublicKey == "" && r.file == "" {
		x.Secret = token
	}
	if x.OldUntil, err = d.RotateSecret(ctx, endpoint, &desk.Rotation{Secret: token, Keep: r.keep, Drop: r.yes, Keys: keys}); err != nil {
		return err
	}
	return a.print(q, x, func(w *tabwriter.Writer) {
		line(w, "Endpoint", "%s", x.EndpointID)
		line(w, "New secret", "%s%s", x.Secret, suffixIf(x.Secret != "", "   (for the receiver; it is not shown again)"))
		line(w, "Public key", "%s%s", x.PublicKey, suffixIf(x.PublicKey != "", "   (for the receiver)"))
		if x.OldUntil.IsZero() {
			line(w, "Old secret", "signs no more")
		} else {
			line(w, "Old secret", "signs as well until %s", when(x.OldUntil, d.Now()))
		}
		if x.SealedWith == "" {
			line(w, "Stored", "as it is: secrets.keys has no key to seal it with")
		} else {
			line(w, "Stored", "sealed with the key %s", x.SealedWith)
		}
	})
}

// spanFlag reads a length of time, in days as well.
func spanFlag(d *time.Duration) *textFlag {
	return &textFlag{"TIME", durationText(*d), func(text string) error {
		span, err := parseSpan(text)
		if err != nil || span < 0 {
			return errors.New("write a number and a unit, such as 90m, 24h or 7d")
		}
		*d = span
		return nil
	}}
}
