package desk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

// Changing secrets takes rights that the running relay does not have: it has to read them, and nobody who has taken it over is to lock the receivers out.

// secretColumns are those that a rotation writes.
const secretColumns = "secret_token, secondary_secret_token, secondary_secret_expires_at"

// Rotation says how an endpoint gets a new secret.
type Rotation struct {
	Secret string // the new one
	// Keep is how long the old secret goes on signing beside the new one. Zero: it ends at once.
	Keep time.Duration
	// Drop allows to end an even older secret that still signs: there is room for two.
	Drop bool
	// Keys seal both; without any they are stored as they are.
	Keys *seal.Ring
}

// storedSecrets is what an endpoint has.
type storedSecrets struct {
	primary, secondary string
	signs              bool // the secondary one still does
	until              Time // so long; zero: for ever
}

// RotateSecret puts a new secret in the place of an endpoint's, which becomes its second one, and returns how long that signs: zero if it does not.
func (d *Desk) RotateSecret(ctx context.Context, endpoint outbox.UUID, r *Rotation) (until Time, err error) {
	const op = "rotate secret"
	err = pgx.BeginFunc(ctx, d.conn, func(tx pgx.Tx) error {
		var was storedSecrets
		err := tx.QueryRow(ctx, d.sql(`
SELECT coalesce(e.secret_token, '')::text, coalesce(e.secondary_secret_token, '')::text, coalesce(e.secondary_secret_expires_at > now(), true),
  e.secondary_secret_expires_at::timestamptz FROM {tenant}.webhook_endpoints e WHERE e.id = $1::uuid FOR NO KEY UPDATE`), endpoint).
			Scan(&was.primary, &was.secondary, &was.signs, &was.until)
		if errors.Is(err, pgx.ErrNoRows) {
			return d.notFound(ctx, "endpoint", endpoint)
		}
		if err != nil {
			return err
		}
		old, fresh, err := d.rotated(endpoint, &was, r)
		if err != nil {
			return err
		}
		return tx.QueryRow(ctx, d.sql(`
UPDATE {tenant}.webhook_endpoints e SET secret_token = $2::text, secondary_secret_token = nullif($3::text, ''),
  secondary_secret_expires_at = CASE WHEN $3::text <> '' THEN now() + make_interval(secs => $4::float8) END
WHERE e.id = $1::uuid RETURNING e.secondary_secret_expires_at::timestamptz`), endpoint, fresh, old, r.Keep.Seconds()).Scan(&until)
	})
	if err != nil {
		return until, d.secretFault(op, err)
	}
	return until, nil
}

// rotated returns what is to be stored in place of what was; old is empty if it is to end.
func (d *Desk) rotated(endpoint outbox.UUID, was *storedSecrets, r *Rotation) (old, fresh string, err error) {
	if was.secondary != "" && was.signs && !r.Drop {
		more := "without end"
		if !was.until.IsZero() {
			more = "until " + was.until.Format(time.RFC3339)
		}
		return "", "", &Error{
			Err:  fmt.Errorf("the endpoint has a second secret that signs %s, and room for two: a third would end it", more),
			hint: "wait, or say --yes if no receiver verifies with it any more",
		}
	}
	old = was.primary
	if seal.IsSealed(old) {
		if r.Keys.Empty() {
			return "", "", &Error{Err: errors.New("the endpoint's secret is sealed, and the new one would not be"), hint: "give this command the relay's secrets.keys"}
		}
		if old, err = r.Keys.Open(d.tenant, endpoint, old); err != nil && r.Keep > 0 {
			return "", "", &Error{Err: fmt.Errorf("the old secret %w", err), hint: "with --expires 0s it ends at once, and need not be opened"}
		}
	}
	if old == r.Secret {
		return "", "", &Error{Err: errors.New("the new secret is the one that the endpoint has"), hint: "give another one"}
	}
	if fresh, err = d.stored(r.Keys, endpoint, r.Secret); err != nil {
		return "", "", err
	}
	if r.Keep == 0 || old == "" {
		return "", fresh, nil
	}
	old, err = d.stored(r.Keys, endpoint, old)
	return old, fresh, err
}

// stored is what the table holds of a secret.
func (d *Desk) stored(keys *seal.Ring, endpoint outbox.UUID, secret string) (string, error) {
	if keys.Empty() {
		return secret, nil
	}
	return keys.Seal(d.tenant, endpoint, secret)
}

// secretFault is fault for what the role of the running relay may not do.
func (d *Desk) secretFault(op string, err error) error {
	err = d.fault(op, err)
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return err
	}
	if server, ok := errors.AsType[*pgconn.PgError](e.Err); ok {
		table := pgx.Identifier{d.tenant, "webhook_endpoints"}.Sanitize()
		switch server.Code {
		case "42501":
			e.hint = fmt.Sprintf("the relay's own role may read secrets only: use one that owns the tenant's tables, or GRANT SELECT, UPDATE (%s) ON %s TO %s",
				secretColumns, table, pgx.Identifier{d.conn.Conn().Config().User}.Sanitize())
		case "22001":
			e.hint = fmt.Sprintf("the column is too narrow: ALTER TABLE %s ALTER COLUMN secret_token TYPE varchar(512)", table)
		}
	}
	return e
}

// SecretCount is how the secrets of a tenant are kept.
type SecretCount struct {
	Plain   int64 `json:"plain"`
	Older   int64 `json:"older_key"`   // sealed with another key than the first one
	Current int64 `json:"current_key"` // sealed with the first one
}

// CountSecrets counts those of the tenant. keys are to seal them.
func (d *Desk) CountSecrets(ctx context.Context, keys *seal.Ring) (n SecretCount, err error) {
	err = d.conn.QueryRow(ctx, d.sql(`
SELECT count(*) FILTER (WHERE NOT s.sealed), count(*) FILTER (WHERE s.sealed AND NOT s.current), count(*) FILTER (WHERE s.current)
FROM {tenant}.webhook_endpoints e CROSS JOIN LATERAL (VALUES (e.secret_token::text), (e.secondary_secret_token::text)) v (token)
CROSS JOIN LATERAL (SELECT starts_with(v.token, 'sealed:') AS sealed, starts_with(v.token, $1::text) AS current) s WHERE v.token <> ''`), seal.Prefix(keys.First())).
		Scan(&n.Plain, &n.Older, &n.Current)
	if err != nil {
		return n, d.secretFault("count secrets", err)
	}
	return n, nil
}

// SealFault is a secret that could not be sealed.
type SealFault struct {
	EndpointID outbox.UUID `json:"endpoint_id"`
	Column     string      `json:"column"`
	Why        string      `json:"why"`
}

// Sealed is what a batch has come to.
type Sealed struct {
	Sealed int64
	Faults []SealFault
	Last   outbox.UUID // where the next one begins; zero: there is none
}

// SealSecrets seals the secrets of up to n endpoints after one, zero for the first ones: what is plain, and what another key than the first one of keys has
// sealed. What cannot be opened stays as it is.
func (d *Desk) SealSecrets(ctx context.Context, keys *seal.Ring, after outbox.UUID, n int) (done Sealed, err error) {
	type row struct {
		ID                 outbox.UUID
		Primary, Secondary string
	}
	err = pgx.BeginFunc(ctx, d.conn, func(tx pgx.Tx) error {
		rows, err := collect(ctx, d, "read secrets", pgx.RowToStructByPos[row], `
SELECT e.id, coalesce(e.secret_token, '')::text, coalesce(e.secondary_secret_token, '')::text FROM {tenant}.webhook_endpoints e
WHERE ($1::uuid IS NULL OR e.id > $1::uuid) AND (e.secret_token <> '' AND NOT starts_with(e.secret_token::text, $2::text)
  OR e.secondary_secret_token <> '' AND NOT starts_with(e.secondary_secret_token::text, $2::text))
ORDER BY e.id LIMIT $3::int4 FOR NO KEY UPDATE`, after, seal.Prefix(keys.First()), n)
		if err != nil || len(rows) == 0 {
			return err
		}
		var ids []outbox.UUID
		var primaries, secondaries []string
		for _, r := range rows {
			before := done.Sealed
			primary := d.resealed(keys, r.ID, "secret_token", r.Primary, &done)
			secondary := d.resealed(keys, r.ID, "secondary_secret_token", r.Secondary, &done)
			if done.Sealed > before {
				ids, primaries, secondaries = append(ids, r.ID), append(primaries, primary), append(secondaries, secondary)
			}
			done.Last = r.ID
		}
		_, err = tx.Exec(ctx, d.sql(`
UPDATE {tenant}.webhook_endpoints e SET secret_token = coalesce(nullif(u.first, ''), e.secret_token), secondary_secret_token = coalesce(nullif(u.second, ''), e.secondary_secret_token)
FROM unnest($1::uuid[], $2::text[], $3::text[]) u (id, first, second) WHERE e.id = u.id`), ids, primaries, secondaries)
		return err
	})
	if err != nil {
		return Sealed{}, d.secretFault("seal secrets", err)
	}
	return done, nil
}

// resealed is what is to be stored of a token; empty if it is to stay as it is.
func (d *Desk) resealed(keys *seal.Ring, endpoint outbox.UUID, column, token string, done *Sealed) string {
	if token == "" || seal.KeyOf(token) == keys.First() {
		return ""
	}
	secret, err := token, error(nil)
	if seal.IsSealed(token) {
		secret, err = keys.Open(d.tenant, endpoint, token)
	}
	if err == nil {
		secret, err = keys.Seal(d.tenant, endpoint, secret)
	}
	if err != nil {
		done.Faults = append(done.Faults, SealFault{endpoint, column, err.Error()})
		return ""
	}
	done.Sealed++
	return secret
}

// Tenants lists the registered tenants.
func Tenants(ctx context.Context, conn *pgx.Conn) ([]string, error) {
	d := newDesk(conn, "", sessionSQL)
	return collect(ctx, d, "list tenants", pgx.RowTo[string], `SELECT t.schema FROM outbox_relay.tenants t ORDER BY 1`)
}
