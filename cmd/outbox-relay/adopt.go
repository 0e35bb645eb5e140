package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/schema"
)

// adoptEvery is how often schemas are looked for that tenants.auto_adopt asks for. An event committed before its schema was found is not sent, so
// provisioning code that must not miss one calls outbox_relay.add_tenant itself.
const adoptEvery = 5 * time.Second

// adoptPatience bounds each try, so that a schema whose tables are in use does not keep the others waiting.
const adoptPatience = 30 * time.Second

// autoAdopt registers schemas that match the patterns as soon as they hold the tables of a tenant, until ctx is done. A schema that cannot be
// adopted is told of once, and again when the reason changes or comes back; so is a database that cannot be asked.
func autoAdopt(ctx context.Context, c *config, log *slog.Logger) error {
	if len(c.Tenants.AutoAdopt) == 0 {
		return nil
	}
	told := make(map[string]string)
	tell := func(name string, err error) {
		if ctx.Err() == nil && told[name] != err.Error() {
			told[name] = err.Error()
			log.Error("schema not adopted", "schema", name, "error", err)
		}
	}
	tick := time.NewTicker(adoptEvery)
	defer tick.Stop()
	for {
		names, err := candidates(ctx, c)
		if err != nil {
			tell("", err)
		} else { // what is mended or gone may come back
			maps.DeleteFunc(told, func(name, _ string) bool { return !slices.Contains(names, name) })
		}
		for _, name := range names {
			if err := adopt(ctx, c, name); err != nil {
				tell(name, err)
				continue
			}
			log.Info("schema adopted", "schema", name)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func adopt(ctx context.Context, c *config, name string) error {
	ctx, cancel := context.WithTimeout(ctx, adoptPatience)
	defer cancel()
	dsn, err := c.Database.DSN()
	if err != nil {
		return err
	}
	err = schema.AddTenant(ctx, dsn, name, schema.AddOptions{})
	if denied := new(pgconn.PgError); errors.As(err, &denied) && denied.Code == "42501" {
		return fmt.Errorf("%w (hint: tenants.auto_adopt needs a right more than the rest: %s)", denied, adoptRemedy)
	}
	return err
}

const adoptRemedy = "GRANT EXECUTE ON FUNCTION outbox_relay.add_tenant(text, text, timestamptz) TO " + schema.RunnerRole

func candidates(ctx context.Context, c *config) ([]string, error) {
	dsn, err := c.Database.DSN() // it may have another password by now
	if err != nil {
		return nil, err
	}
	conn, err := dial(ctx, c.urlKey(), dsn, c.Database.ConnectTimeout, nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing is lost with it
	names, err := schema.Candidates(ctx, conn, c.Tenants.AutoAdopt)
	if err != nil {
		return nil, fmt.Errorf("look for schemas to adopt: %w", err)
	}
	return names, nil
}
