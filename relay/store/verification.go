package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// Verification is what is known of the verification of an endpoint.
type Verification struct {
	Endpoint
	VerifiedFor []byte        // delivery.HashURL of the URL that is_verified is about; nil: none was noted
	TriedFor    []byte        // of the one that the tries were for; nil: there were none
	Tries       int           // that failed
	Again       bool          // there is to be another try
	Next        time.Duration // until it is; zero or less: it is due
}

// Verifications lists what is known of the endpoints of some tenants.
func (s *Store) Verifications(ctx context.Context, tenants []string) ([]Verification, error) {
	rows, _ := s.pool.Query(ctx, `
SELECT v.tenant, v.endpoint_id, v.verified_for, v.tried_for, v.tries, v.next_at IS NOT NULL, coalesce(extract(epoch FROM v.next_at - now()) * 1e6, 0)::int8
FROM outbox_relay.endpoint_verification v WHERE v.tenant = ANY($1::text[])`, tenants)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (v Verification, err error) {
		var next int64
		err = row.Scan(&v.Tenant, &v.ID, &v.VerifiedFor, &v.TriedFor, &v.Tries, &v.Again, &next)
		v.Next = time.Duration(next) * time.Microsecond
		return v, err
	})
	return list, wrap(err, "read verifications")
}

const noteVerified = `
INSERT INTO outbox_relay.endpoint_verification (tenant, endpoint_id, verified_for) SELECT $1::text, u.id, u.hash FROM unnest($2::uuid[], $3::bytea[]) u (id, hash)
ON CONFLICT (tenant, endpoint_id) DO UPDATE SET verified_for = excluded.verified_for`

// NoteVerified notes which URLs the is_verified of some endpoints of a tenant is about: somebody else has set it. hashes are of delivery.HashURL.
func (s *Store) NoteVerified(ctx context.Context, tenant string, ids []outbox.UUID, hashes [][]byte) error {
	_, err := s.pool.Exec(ctx, noteVerified, tenant, ids, hashes)
	return verificationFault(err, tenant, "note verified endpoints")
}

// The row of the endpoint comes first: it may be waited for, though not long, and whoever has it decides whether there is anything to say.
const (
	setVerified = `
UPDATE {tenant}.webhook_endpoints e SET is_verified = true, verified_at = now() WHERE e.id = $1::uuid AND e.endpoint_url::text = $2::text`

	saveVerified = `
INSERT INTO outbox_relay.endpoint_verification AS v (tenant, endpoint_id, verified_for, tried_for, tried_at) VALUES ($1::text, $2::uuid, $3::bytea, $3::bytea, now())
ON CONFLICT (tenant, endpoint_id) DO UPDATE SET verified_for = excluded.verified_for, tried_for = excluded.tried_for, tried_at = now(),
  tries = 0, next_at = NULL, error = NULL`
)

// Verified says of an endpoint that it is verified with a URL. False: it has another URL by now, or is gone, and nothing is said.
func (s *Store) Verified(ctx context.Context, e Endpoint, url string) (verified bool, err error) {
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, claimPatience); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, forTenant(setVerified, e.Tenant), e.ID, url)
		if verified = tag.RowsAffected() > 0; err != nil || !verified {
			return err
		}
		_, err = tx.Exec(ctx, saveVerified, e.Tenant, e.ID, delivery.HashURL(url))
		return err
	})
	return verified && err == nil, verificationFault(err, e.Tenant, "verify endpoint "+e.ID.String())
}

// What has been verified with the URL meanwhile stays so, and what is known of it as well.
const (
	clearVerified = `
UPDATE {tenant}.webhook_endpoints e SET is_verified = false WHERE e.id = $1::uuid AND e.is_verified AND NOT EXISTS (
  SELECT FROM outbox_relay.endpoint_verification v WHERE v.tenant = $2::text AND v.endpoint_id = e.id AND v.verified_for = $3::bytea)`

	forgetVerified = `
DELETE FROM outbox_relay.endpoint_verification v WHERE v.tenant = $2::text AND v.endpoint_id = $1::uuid
  AND NOT EXISTS (SELECT FROM {tenant}.webhook_endpoints e WHERE e.id = v.endpoint_id AND e.is_verified)`
)

// Unverify says of an endpoint that it is not verified, unless it is with this URL, and forgets what was known of it: everything begins anew.
func (s *Store) Unverify(ctx context.Context, e Endpoint, url string) error {
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, claimPatience); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, forTenant(clearVerified, e.Tenant), e.ID, e.Tenant, delivery.HashURL(url)); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, forTenant(forgetVerified, e.Tenant), e.ID, e.Tenant)
		return err
	})
	return verificationFault(err, e.Tenant, "take back the verification of endpoint "+e.ID.String())
}

const saveUnverified = `
INSERT INTO outbox_relay.endpoint_verification AS v (tenant, endpoint_id, tried_for, tries, tried_at, next_at, error)
VALUES ($1::text, $2::uuid, $3::bytea, $4::int4, now(), now() + nullif($5::int8, -1) * interval '1 microsecond', $6::text)
ON CONFLICT (tenant, endpoint_id) DO UPDATE SET tried_for = excluded.tried_for, tries = excluded.tries, tried_at = now(), next_at = excluded.next_at,
  error = excluded.error`

// NotVerified notes a try that has failed, and how many these are by now for the URL. A negative next says that there will be no other.
func (s *Store) NotVerified(ctx context.Context, e Endpoint, url string, tries int, next time.Duration, reason string) error {
	due := int64(-1)
	if next >= 0 {
		due = next.Microseconds()
	}
	_, err := s.pool.Exec(ctx, saveUnverified, e.Tenant, e.ID, delivery.HashURL(url), tries, due, text(reason))
	return verificationFault(err, e.Tenant, "note the verification of endpoint "+e.ID.String())
}

// NoteTry notes a try beside those of the leader, which has failed.
func (s *Store) NoteTry(ctx context.Context, e Endpoint, reason string) error {
	_, err := s.pool.Exec(ctx, `
INSERT INTO outbox_relay.endpoint_verification AS v (tenant, endpoint_id, tried_at, error) VALUES ($1::text, $2::uuid, now(), $3::text)
ON CONFLICT (tenant, endpoint_id) DO UPDATE SET tried_at = now(), error = excluded.error`, e.Tenant, e.ID, text(reason))
	return verificationFault(err, e.Tenant, "note the verification of endpoint "+e.ID.String())
}

// ForgetVerifications is for endpoints of a tenant that are gone.
func (s *Store) ForgetVerifications(ctx context.Context, tenant string, ids []outbox.UUID) error {
	_, err := s.pool.Exec(ctx, `DELETE FROM outbox_relay.endpoint_verification v WHERE v.tenant = $1::text AND v.endpoint_id = ANY($2::uuid[])`, tenant, ids)
	return wrap(err, "forget verifications")
}

// verificationFault is a *TenantError for what is wrong with the tenant's tables.
func verificationFault(err error, tenant, doing string) error {
	if isTenants(err) {
		return &TenantError{Tenant: tenant, Err: fmt.Errorf("%s: %w", doing, err)}
	}
	return wrap(err, doing)
}
