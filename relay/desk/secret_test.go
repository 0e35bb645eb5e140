package desk_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/seal"
)

// ringOf makes keys of these ids; those of one id are the same.
func ringOf(t *testing.T, ids ...string) *seal.Ring {
	t.Helper()
	var keys []seal.Key
	for _, id := range ids {
		key, err := seal.ParseKey(id, strings.Repeat("0", 64-len(id))+id)
		require.NoError(t, err)
		keys = append(keys, key)
	}
	r, err := seal.NewRing(keys...)
	require.NoError(t, err)
	return r
}

const oldSecret = "s3cret-of-the-endpoint" // of bundle.endpoint

// secrets are the tokens of an endpoint as they are stored.
func (b *bundle) secrets(id outbox.UUID) (primary, secondary string) {
	b.t.Helper()
	require.NoError(b.t, b.conn.QueryRow(b.ctx, `SELECT secret_token, coalesce(secondary_secret_token, '') FROM acme.webhook_endpoints WHERE id = $1::uuid`, id).
		Scan(&primary, &secondary))
	return primary, secondary
}

func TestRotatePlainSecret(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id, other := b.endpoint("Shop", "none"), b.endpoint("Other", "none")
	until, err := b.desk.RotateSecret(b.ctx, id, &desk.Rotation{Secret: "new-secret", Keep: time.Hour})
	require.NoError(t, err)
	assert.WithinDuration(t, time.Now().Add(time.Hour), until.Time, time.Minute)
	primary, secondary := b.secrets(id)
	assert.Equal(t, []string{"new-secret", oldSecret}, []string{primary, secondary})
	primary, secondary = b.secrets(other)
	assert.Equal(t, []string{oldSecret, ""}, []string{primary, secondary})

	// There is room for two, so that a third one takes a word.
	_, err = b.desk.RotateSecret(b.ctx, id, &desk.Rotation{Secret: "third-secret", Keep: time.Hour})
	require.ErrorContains(t, err, "has a second secret that signs until 20")
	assert.Contains(t, hint(err), "--yes")
	until, err = b.desk.RotateSecret(b.ctx, id, &desk.Rotation{Secret: "third-secret", Drop: true})
	require.NoError(t, err)
	assert.True(t, until.IsZero(), "it ends at once")
	primary, secondary = b.secrets(id)
	assert.Equal(t, []string{"third-secret", ""}, []string{primary, secondary})
	assert.True(t, get[bool](b, `SELECT secondary_secret_expires_at IS NULL FROM acme.webhook_endpoints WHERE id = $1::uuid`, id))

	b.exec(`UPDATE acme.webhook_endpoints SET secondary_secret_token = 'x' WHERE id = $1::uuid`, id)
	_, err = b.desk.RotateSecret(b.ctx, id, &desk.Rotation{Secret: "fourth-secret", Keep: time.Hour})
	require.ErrorContains(t, err, "signs without end")
	b.exec(`UPDATE acme.webhook_endpoints SET secondary_secret_expires_at = now() - interval '1 second' WHERE id = $1::uuid`, id)
	_, err = b.desk.RotateSecret(b.ctx, id, &desk.Rotation{Secret: "fourth-secret", Keep: time.Hour})
	require.NoError(t, err, "one that is over is in nobody's way")

	_, err = b.desk.RotateSecret(b.ctx, id, &desk.Rotation{Secret: "fourth-secret", Drop: true})
	require.ErrorContains(t, err, "the one that the endpoint has")
	_, err = b.desk.RotateSecret(b.ctx, outbox.UUID{1}, &desk.Rotation{Secret: "x"})
	require.ErrorContains(t, err, "tenant acme has no endpoint")
}

func TestRotateSealsBoth(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id, k1, both := b.endpoint("Shop", "none"), ringOf(t, "1"), ringOf(t, "2", "1")
	rotate := func(keys *seal.Ring, secret string, keep time.Duration) error {
		_, err := b.desk.RotateSecret(b.ctx, id, &desk.Rotation{Secret: secret, Keep: keep, Keys: keys, Drop: true})
		return err
	}
	opened := func(keys *seal.Ring) []string {
		var list []string
		primary, secondary := b.secrets(id)
		for _, text := range []string{primary, secondary} {
			assert.Equal(t, keys.First(), seal.KeyOf(text))
			secret, err := keys.Open("acme", id, text)
			require.NoError(t, err)
			list = append(list, secret)
		}
		return list
	}
	require.NoError(t, rotate(k1, "second-secret", time.Hour))
	assert.Equal(t, []string{"second-secret", oldSecret}, opened(k1), "a plain one is sealed with it")
	require.NoError(t, rotate(both, "third-secret", time.Hour))
	assert.Equal(t, []string{"third-secret", "second-secret"}, opened(both), "one of an older key is sealed anew")

	err := rotate(nil, "plain-secret", 0)
	require.ErrorContains(t, err, "is sealed, and the new one would not be")
	err = rotate(ringOf(t, "3"), "fourth-secret", time.Hour)
	require.ErrorContains(t, err, "the old secret is sealed with the key 2, which is not among secrets.keys")
	assert.Contains(t, hint(err), "--expires 0s")
	require.ErrorIs(t, rotate(both, strings.Repeat("s", seal.MaxSecret+1), 0), seal.ErrSecret)
	assert.Equal(t, []string{"third-secret", "second-secret"}, opened(both), "nothing has changed")

	require.NoError(t, rotate(ringOf(t, "3"), "fourth-secret", 0), "so a lost key is no dead end")
	primary, secondary := b.secrets(id)
	assert.Equal(t, "3", seal.KeyOf(primary))
	assert.Empty(t, secondary)
}

// sealAll works like the command, two endpoints at a time.
func sealAll(b *bundle, keys *seal.Ring) (sealed int64, faults []desk.SealFault) {
	b.t.Helper()
	var last outbox.UUID
	for {
		done, err := b.desk.SealSecrets(b.ctx, keys, last, 2)
		require.NoError(b.t, err)
		sealed, faults = sealed+done.Sealed, append(faults, done.Faults...)
		if last = done.Last; last.IsZero() {
			return sealed, faults
		}
	}
}

func TestSealSecrets(t *testing.T) {
	t.Parallel()
	b := setup(t)
	k1, both, k2 := ringOf(t, "1"), ringOf(t, "2", "1"), ringOf(t, "2")
	list := make([]outbox.UUID, 0, 7)
	for i := range 7 {
		list = append(list, b.endpoint(fmt.Sprint(i), "none"))
	}
	b.exec(`UPDATE acme.webhook_endpoints SET secondary_secret_token = 's3cret-second' WHERE name IN ('1', '5')`)
	b.exec(`UPDATE acme.webhook_endpoints SET secret_token = '' WHERE name = '6'`)
	n, err := b.desk.CountSecrets(b.ctx, k1)
	require.NoError(t, err)
	assert.Equal(t, desk.SecretCount{Plain: 8}, n)
	sealed, faults := sealAll(b, k1)
	assert.Equal(t, int64(8), sealed)
	assert.Empty(t, faults)
	assert.Empty(t, get[string](b, `SELECT secret_token FROM acme.webhook_endpoints WHERE name = '6'`), "what is missing stays so")
	sealed, _ = sealAll(b, k1)
	assert.Zero(t, sealed, "there is nothing left to do")

	// A plain one has come, one was damaged, one was copied from its neighbour.
	late := b.endpoint("late", "none")
	b.exec(`UPDATE acme.webhook_endpoints SET secret_token = overlay(secret_token placing CASE substr(secret_token, 20, 1) WHEN 'A' THEN 'B' ELSE 'A' END from 20) WHERE id = $1::uuid`, list[2])
	b.exec(`UPDATE acme.webhook_endpoints e SET secret_token = o.secret_token FROM acme.webhook_endpoints o WHERE e.id = $1::uuid AND o.id = $2::uuid`, list[3], list[4])
	n, err = b.desk.CountSecrets(b.ctx, both)
	require.NoError(t, err)
	assert.Equal(t, desk.SecretCount{Plain: 1, Older: 8}, n)
	sealed, faults = sealAll(b, both)
	assert.Equal(t, int64(7), sealed)
	require.Len(t, faults, 2)
	assert.Equal(t, []outbox.UUID{list[2], list[3]}, []outbox.UUID{faults[0].EndpointID, faults[1].EndpointID})
	assert.Equal(t, "secret_token", faults[0].Column)
	assert.Contains(t, faults[1].Why, "is sealed with the key 1 and cannot be opened")
	for _, id := range []outbox.UUID{list[0], list[1], list[4], list[5], late} {
		primary, secondary := b.secrets(id)
		secret, err := k2.Open("acme", id, primary)
		require.NoError(t, err)
		assert.Equal(t, oldSecret, secret)
		if secondary != "" {
			secret, err = k2.Open("acme", id, secondary)
			require.NoError(t, err)
			assert.Equal(t, "s3cret-second", secret)
		}
	}
	n, err = b.desk.CountSecrets(b.ctx, both)
	require.NoError(t, err)
	assert.Equal(t, desk.SecretCount{Older: 2, Current: 7}, n)

	// The routing table of the relay opens them, and says what does not open.
	d := defaults()
	d.Keys = k2
	table := b.registry().Routing(d)
	invalid := make(map[outbox.UUID]string)
	for _, row := range table.Invalid() {
		invalid[row.ID] = row.Err.Error()
	}
	assert.Len(t, invalid, 3)
	assert.Contains(t, invalid[list[2]], "which is not among secrets.keys")
	assert.NotNil(t, table.Endpoint(late))
	tenants, err := desk.Tenants(b.ctx, b.conn)
	require.NoError(t, err)
	assert.Equal(t, []string{"acme"}, tenants)
}

// The running relay reads secrets and cannot change them; who may is said.
func TestRunnerCannotChangeSecrets(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.endpoint("Shop", "none")
	role := "r_" + b.conn.Config().Database
	b.exec("CREATE ROLE " + role + " LOGIN IN ROLE outbox_relay_runner")
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		conn, err := pgx.Connect(ctx, b.dsn)
		require.NoError(t, err)
		_, err = conn.Exec(ctx, "DROP OWNED BY "+role+"; DROP ROLE "+role)
		assert.NoError(t, err)
		assert.NoError(t, conn.Close(ctx))
	})
	cfg := b.conn.Config()
	d := b.open(fmt.Sprintf("postgres://%s@%s:%d/%s?sslmode=disable", role, cfg.Host, cfg.Port, cfg.Database), "acme")
	remedy := fmt.Sprintf(`use one that owns the tenant's tables, or GRANT SELECT, UPDATE (secret_token, secondary_secret_token, secondary_secret_expires_at) ON "acme"."webhook_endpoints" TO "%s"`, role)
	_, err := d.RotateSecret(b.ctx, id, &desk.Rotation{Secret: "new-secret"})
	require.ErrorContains(t, err, "rotate secret: ")
	assert.Contains(t, hint(err), remedy)
	_, err = d.SealSecrets(b.ctx, ringOf(t, "1"), outbox.UUID{}, 10)
	require.Error(t, err)
	assert.Contains(t, hint(err), remedy)
	_, err = d.CountSecrets(b.ctx, ringOf(t, "1"))
	require.NoError(t, err)

	b.exec("REVOKE outbox_relay_runner FROM " + role)
	b.exec(`GRANT USAGE ON SCHEMA acme TO ` + role)
	b.exec(`GRANT SELECT, UPDATE (secret_token, secondary_secret_token, secondary_secret_expires_at) ON acme.webhook_endpoints TO ` + role)
	_, err = d.RotateSecret(b.ctx, id, &desk.Rotation{Secret: "new-secret", Keep: time.Hour})
	require.NoError(t, err, "the grant of the remedy suffices")
	done, err := d.SealSecrets(b.ctx, ringOf(t, "1"), outbox.UUID{}, 10)
	require.NoError(t, err)
	assert.Equal(t, int64(2), done.Sealed)
}

func TestProbeOpensTheSecret(t *testing.T) {
	t.Parallel()
	id := outbox.UUID{1}
	keys := ringOf(t, "1")
	text, err := keys.Seal("acme", id, oldSecret)
	require.NoError(t, err)
	d := defaults()
	d.Keys, d.Tenant = keys, "other"
	_, err = desk.Probe(t.Context(), nil, delivery.EndpointRow{ID: id, URL: "http://127.0.0.1:1", SecretToken: text}, d, "test")
	require.ErrorContains(t, err, "cannot be opened")
}
