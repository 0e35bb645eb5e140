package main

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestEncodingOfTheDatabase: one that is not UTF8 could not keep what receivers answer. It is neither set up, nor led by a relay if somebody has set it up by hand.
func TestEncodingOfTheDatabase(t *testing.T) {
	t.Parallel()
	const refused, remedy = "the encoding of the database is not UTF8", "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
	server, err := pgtest.Start(t.Context(), pgtest.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, server.Close()) })
	for _, encoding := range []string{"LATIN1", "SQL_ASCII"} {
		name := "of_" + encoding
		execOn(t, server.URL("postgres"), fmt.Sprintf("CREATE DATABASE %s ENCODING '%s' LOCALE 'C' TEMPLATE template0", pgx.Identifier{name}.Sanitize(), encoding))
		env := []string{"OUTBOX_RELAY_DATABASE_URL=" + server.URL(name), "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0"}
		o := invoke(t, env, "check")
		assert.Contains(t, failures(o), "FAIL  server_encoding: "+encoding+" → move the data into a database made with: "+remedy)
		o = invoke(t, env, "migrate")
		assert.Equal(t, exitFailure, o.code)
		assert.Contains(t, o.err, refused+", but "+encoding)
		assert.Contains(t, o.err, remedy)

		printed := invoke(t, env, "migrate", "--print")
		conn, err := pgx.Connect(t.Context(), server.URL(name))
		require.NoError(t, err)
		_, err = conn.PgConn().Exec(t.Context(), printed.out).ReadAll()
		assert.NoError(t, conn.Close(context.WithoutCancel(t.Context())))
		require.NoError(t, err)
		o = invoke(t, env, "run")
		assert.Equal(t, exitFailure, o.code)
		assert.Contains(t, o.err, refused)
		assert.Contains(t, o.err, remedy)
	}
}
