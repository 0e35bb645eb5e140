package main

import (
	"github.com/spf13/cobra"
)

func (a *app) configCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "config",
		Short: "Print the configuration in effect, passwords hidden, and validate it",
		Long: `Print the configuration in effect as YAML: defaults, file, environment and flags put together,
passwords hidden.

Every fault is then listed at once, with its key, its value and what would do; the exit code is 2 if
there is any. Nothing is connected to: "outbox-relay check" looks at the database.`,
		Example: `  outbox-relay config --config /etc/outbox-relay/config.yaml
  OUTBOX_RELAY_NETWORK_ALLOW=10.0.0.0/8,fd00::/8 outbox-relay config | grep -A2 network`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, fault := a.load(cmd)
			if err := c.write(a.out); err != nil {
				return err
			}
			return fault
		},
	}
}
