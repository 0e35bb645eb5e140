package main

import (
	"context"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/schema"
)

// completeTenants has shells complete the names of tenants, wherever a command below this one takes one.
func (a *app) completeTenants(cmd *cobra.Command) {
	if cmd.Flags().Lookup("tenant") != nil {
		_ = cmd.RegisterFlagCompletionFunc("tenant", a.tenantNames) // fails for a flag that is not there
	}
	if strings.HasSuffix(cmd.Use, " SCHEMA") && cmd.Name() != "add" {
		cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, text string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.tenantNames(cmd, args, text)
		}
	}
	for _, sub := range cmd.Commands() {
		a.completeTenants(sub)
	}
}

// completePatience is how long somebody who presses the tab key waits.
const completePatience = 2 * time.Second

// tenantNames lists those of the configured database. Where there is no telling, nothing is offered.
func (a *app) tenantNames(cmd *cobra.Command, _ []string, _ string) (names []cobra.Completion, directive cobra.ShellCompDirective) {
	c, err := a.loadOne(cmd)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completePatience)
	defer cancel()
	_ = withDatabase(ctx, &c, func(conn *pgx.Conn) error {
		tenants, err := schema.Tenants(ctx, lent(conn))
		for _, t := range tenants {
			names = append(names, cobra.CompletionWithDesc(t.Schema, t.State))
		}
		return err
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}
