package store

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// A pipeline sends statements whose results do not matter in one round trip.
//
// It is what pgx.Batch is not: a thousand tenants are a thousand texts of each statement, and a batch would first ask the server to
// describe those that its cache has lost. The types of our parameters are known, so there is nothing to ask, nothing to keep on either
// side, and no stale plan after a change of a tenant's table.
type pipeline struct {
	conn    *pgx.Conn
	batch   pgconn.Batch
	builder pgx.ExtendedQueryBuilder
	err     error
}

// add puts a statement at the end. Once the server reports an error it skips all that follow.
func (p *pipeline) add(sql string, args ...any) {
	if p.err != nil {
		return
	}
	sd := pgconn.StatementDescription{ParamOIDs: make([]uint32, len(args))}
	for i, arg := range args {
		t, ok := p.conn.TypeMap().TypeForValue(arg)
		if !ok {
			p.err = fmt.Errorf("parameter %d has no PostgreSQL type for %T", i+1, arg)
			return
		}
		sd.ParamOIDs[i] = t.OID
	}
	if p.err = p.builder.Build(p.conn.TypeMap(), &sd, args); p.err != nil {
		return
	}
	p.batch.ExecParams(sql, p.builder.ParamValues, sd.ParamOIDs, p.builder.ParamFormats, nil)
}

func (p *pipeline) addAll(list []statement) {
	for _, st := range list {
		p.add(st.sql, st.args...)
	}
}

// run sends the pipeline and waits for all answers. It returns the first error.
func (p *pipeline) run(ctx context.Context) error {
	if p.err != nil {
		return p.err
	}
	answers := p.conn.PgConn().ExecBatch(ctx, &p.batch)
	failpoint.Hit(failpoint.Committing)
	return answers.Close()
}
