package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// Exit codes.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// app is what the commands share.
type app struct {
	in       *os.File
	out, err io.Writer
	abort    <-chan struct{} // closed by the second signal: stop without draining
	level    slog.LevelVar   // of the log; may change while a command runs

	configFile string
	database   string // of --database: the name of one of several
	patient    bool   // of run --patient
	started    bool   // a command has begun: what fails before that is a fault of the command line
}

// errFailed ends a command that has already said what is wrong.
var errFailed = errors.New("failed")

// usageError is a fault of the command line that cobra did not find.
type usageError struct{ error }

// Unwrap gives the fault itself, which may have more to say.
func (e usageError) Unwrap() error { return e.error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// subcommandMissing is what a command runs that only holds others.
func subcommandMissing(cmd *cobra.Command, args []string) error {
	var names []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	if len(args) > 0 {
		return usage("unknown command %q for %q: there are %s", args[0], cmd.CommandPath(), strings.Join(names, ", "))
	}
	return usage("a command is missing: there are %s", strings.Join(names, ", "))
}

// mindArguments has the commands that cobra adds refuse what they do not know: they print their help for it and exit with 0.
func mindArguments(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		switch cmd.Name() {
		case "help":
			cmd.Args = func(_ *cobra.Command, args []string) error {
				topic, rest, err := root.Find(args)
				if err == nil && len(rest) > 0 {
					return usage("unknown command %q for %q", rest[0], topic.CommandPath())
				}
				return err
			}
		case "completion":
			cmd.Args, cmd.RunE = cobra.ArbitraryArgs, subcommandMissing
		}
	}
}

// execute runs one command line and returns the exit code.
func (a *app) execute(ctx context.Context, args []string) int {
	root := a.root() //nolint:contextcheck // commands get the context from cobra
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	mindArguments(root)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	a.complain(err)
	if !a.started || errors.As(err, new(usageError)) {
		say(a.err, "hint: see %s --help\n", cmd.CommandPath())
		return exitUsage
	}
	if errors.As(err, new(*configError)) {
		return exitUsage
	}
	return exitFailure
}

// complain says what is wrong, unless that has been said, and what to do about it.
func (a *app) complain(err error) {
	if !errors.Is(err, errFailed) {
		say(a.err, "error: %v\n", err)
	}
	if hint := hintOf(err); hint != "" {
		say(a.err, "hint: %s\n", hint)
	}
}

// hintOf is what to do about an error, if it says so.
func hintOf(err error) string {
	var hinted interface{ Hint() string }
	if errors.As(err, &hinted) {
		return hinted.Hint()
	}
	return ""
}

// hinted is an error with what to do about it.
type hinted struct {
	error
	hint string
}

func (e hinted) Hint() string { return e.hint }

// say prints for a person. Who has closed the pipe does not want to know.
func say(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }

const rootHelp = `outbox-relay delivers the events of a database's outbox tables as webhooks.

An application inserts rows into webhook_events of its tenant's schema, in its own transaction. The
relay reads them from the write-ahead log and sends each to every endpoint that subscribes to it, at
least once.

From nothing to the first delivery:

  export OUTBOX_RELAY_DATABASE_URL='postgres://user@localhost:5432/app'
  outbox-relay migrate                # schema outbox_relay, publications, slot
  outbox-relay tenants add my_schema  # once for every schema that holds an outbox
  outbox-relay check                  # what is missing, and what to do about it
  outbox-relay run

Configuration: defaults, then the file of --config (or OUTBOX_RELAY_CONFIG), then the environment,
then flags; the later wins. The key delivery.workers of the file is OUTBOX_RELAY_DELIVERY_WORKERS in
the environment. Lists have commas there; a variable that is empty counts as not set.
config.example.yaml explains every key; "outbox-relay config" shows what is in effect.

Exit codes: 0 done, 1 failure, 2 usage or configuration.`

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:              "outbox-relay",
		Short:            "Deliver the events of a database's outbox tables as webhooks",
		Long:             rootHelp,
		Version:          version(),
		SilenceUsage:     true,
		SilenceErrors:    true,
		RunE:             subcommandMissing,
		PersistentPreRun: func(*cobra.Command, []string) { a.started = true },
	}
	root.SetVersionTemplate("outbox-relay {{.Version}}\n")
	flags := root.PersistentFlags()
	flags.StringVar(&a.configFile, "config", "", "read the YAML `FILE` (default OUTBOX_RELAY_CONFIG)")
	flags.String("database-url", "", "`DSN` of the database (database.url)")
	flags.String("log-level", "", "log this `LEVEL` and above: debug, info, warn, error (log.level)")
	flags.String("log-format", "", "log as `FORMAT`: json, text, or auto: text on a terminal (log.format)")
	root.AddCommand(a.runCommand(), a.demoCommand(), a.benchCommand(), a.configCommand(), a.metricsCommand(), a.versionCommand())
	for _, cmd := range []*cobra.Command{
		a.migrateCommand(), a.checkCommand(), a.tenantsCommand(), a.deliveriesCommand(), a.deadlettersCommand(), a.endpointsCommand(), a.eventsCommand(), a.auditCommand(),
		a.secretsCommand(), a.statusCommand(),
	} {
		root.AddCommand(a.onDatabase(cmd))
	}
	a.completeTenants(root)
	return root
}

// load reads the configuration for a command.
func (a *app) load(cmd *cobra.Command) (config, error) {
	return loadConfig(a.file(), cmd.Flags())
}

// file is that of the configuration; empty: there is none.
func (a *app) file() string { return cmp.Or(a.configFile, os.Getenv(envPrefix+"_CONFIG")) }

// terminal reports whether the stream is one a person looks at.
func terminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// stamped is the version that the build of a release or an image gives: -ldflags "-X main.stamped=v1.2.3".
//
//nolint:gochecknoglobals // the linker writes there
var stamped string

// version is what was stamped into the binary, by us or by the Go toolchain.
func version() string {
	if stamped != "" {
		return stamped
	}
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "devel"
	}
	return info.Main.Version
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			info, _ := debug.ReadBuildInfo()
			_, err := fmt.Fprintf(a.out, "outbox-relay %s %s\n", version(), info.GoVersion)
			return err
		},
	}
}
