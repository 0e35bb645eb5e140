package wal

import (
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"
)

// What keeps a stream from starting or going on. Open and Run return them inside a *StreamError.
var (
	ErrUnsupported        = errors.New("PostgreSQL is older than version 14")
	ErrWALLevel           = errors.New("wal_level is not logical")
	ErrEncoding           = errors.New("the encoding of the database is not UTF8")
	ErrStandby            = errors.New("the server is a standby")
	ErrNoReplication      = errors.New("the role may not replicate")
	ErrPooler             = errors.New("a connection pooler is in the way")
	ErrSendersExhausted   = errors.New("no WAL sender is left")
	ErrSlotsExhausted     = errors.New("no replication slot is left")
	ErrPublicationMissing = errors.New("publication does not exist")
	ErrPublicationRemade  = errors.New("publication was dropped and made anew")
	ErrSlotMissing        = errors.New("replication slot does not exist")
	ErrSlotForeign        = errors.New("replication slot is of another database or plugin")
	ErrSlotLost           = errors.New("replication slot has lost its WAL")
	ErrSlotActive         = errors.New("replication slot is in use")
	ErrSlotUnfinished     = errors.New("replication slot is being made")
	ErrShutdown           = errors.New("the server shuts down or ended the session")
	ErrSilent             = errors.New("the server does not answer")
	ErrStalled            = errors.New("the server answers, but the log does not come")
	ErrRowTooLarge        = errors.New("a row is larger than the server can send")
)

// StreamError says what the stream was doing, what is wrong, one of the Err values of this package, and what the server said. errors.Is finds both.
type StreamError struct {
	Op        string // such as `start replication on slot "outbox_relay"`
	Kind      error  // one of the Err values
	ActivePID int32  // with ErrSlotActive: the server process that serves the other consumer; 0 when it has gone. With ErrSlotUnfinished: the one that makes it
	At        LSN    // with ErrRowTooLarge: where the transaction commits that has the row
	XID       uint32 // with ErrRowTooLarge: that transaction
	Err       error  // the server's own error; nil if the catalog told
}

func (e *StreamError) Error() string {
	s := e.Op + ": " + e.Kind.Error()
	if e.ActivePID != 0 {
		s += fmt.Sprintf(" by process %d", e.ActivePID)
	}
	if e.At != 0 {
		s += fmt.Sprintf(", in transaction %d that commits at %s", e.XID, e.At)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the kind and the server's error.
func (e *StreamError) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Err}
}

// Hint tells a person what to do.
func (e *StreamError) Hint() string {
	switch {
	case errors.Is(e.Kind, ErrUnsupported):
		return "use PostgreSQL 14 or newer"
	case errors.Is(e.Kind, ErrWALLevel):
		return "set wal_level = logical (managed services have a parameter of their own for it) and restart the server"
	case errors.Is(e.Kind, ErrEncoding):
		return "move the data into a database made with: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
	case errors.Is(e.Kind, ErrStandby):
		return "let the DSN lead to the primary: target_session_attrs=read-write picks it from several hosts"
	case errors.Is(e.Kind, ErrNoReplication):
		return "ALTER ROLE … REPLICATION for the role of the replication URL, and let pg_hba.conf admit it"
	case errors.Is(e.Kind, ErrPooler):
		return "set database.replication_url to an address that leads to the server itself, past the pooler"
	case errors.Is(e.Kind, ErrSendersExhausted):
		return "raise max_wal_senders, or stop other replication clients"
	case errors.Is(e.Kind, ErrSlotsExhausted):
		return "raise max_replication_slots, or drop slots nobody uses (pg_replication_slots)"
	case errors.Is(e.Kind, ErrPublicationMissing):
		return "run: outbox-relay migrate; what a relay has been missing it heals by itself"
	case errors.Is(e.Kind, ErrPublicationRemade):
		return "what the log has left out meanwhile is queued from the tables; ALTER PUBLICATION leaves out nothing"
	case errors.Is(e.Kind, ErrSlotMissing):
		return "run: outbox-relay migrate"
	case errors.Is(e.Kind, ErrSlotForeign):
		return "slots belong to the whole server: configure another slot name for this database"
	case errors.Is(e.Kind, ErrSlotLost):
		return "the relay makes it anew and queues what it missed from the tables; raise max_slot_wal_keep_size to avoid it"
	case errors.Is(e.Kind, ErrSlotActive):
		return "another relay has the slot; it is taken over when that one ends. Two databases of one server need two slot names"
	case errors.Is(e.Kind, ErrSlotUnfinished):
		return "it waits for the transactions that are open in the server, prepared ones too; outbox-relay status names them"
	case errors.Is(e.Kind, ErrRowTooLarge):
		return "bound what applications may insert: ALTER TABLE … ADD CHECK (octet_length(event_data::text) < 10000000) NOT VALID"
	case errors.Is(e.Kind, ErrShutdown), errors.Is(e.Kind, ErrSilent), errors.Is(e.Kind, ErrStalled):
		return "the relay reconnects by itself; if this repeats, look into the server's log and at the network"
	}
	return ""
}

// IsShutdown reports whether err tells that the server shuts down or starts up. It understands errors of any connection of pgx, so that a
// relay whose pool meets the shutdown first can close its stream, which the server waits for.
func IsShutdown(err error) bool {
	if errors.Is(err, ErrShutdown) {
		return true
	}
	var pg *pgconn.PgError
	return errors.As(err, &pg) && errors.Is(kindOf(pg.Code), ErrShutdown)
}

// kindOf classifies the codes that mean one thing wherever they occur; nil for all others. Texts are not looked at: they are translated.
func kindOf(code string) error {
	switch code {
	case "42501", "28000": // insufficient_privilege, invalid_authorization_specification
		return ErrNoReplication
	case "53300": // too_many_connections: WAL senders are counted apart from other sessions
		return ErrSendersExhausted
	case "53400": // configuration_limit_exceeded
		return ErrSlotsExhausted
	case "55006": // object_in_use
		return ErrSlotActive
	case "57P01", "57P02", "57P03": // admin_shutdown, crash_shutdown, cannot_connect_now
		return ErrShutdown
	}
	return nil
}

// fault wraps err as a *StreamError if its code, or one of the given codes, tells the kind; else plainly.
func fault(op string, err error, more map[string]error) error {
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		kind := more[pg.Code]
		if kind == nil {
			kind = kindOf(pg.Code)
		}
		if kind != nil {
			return &StreamError{Op: op, Kind: kind, Err: pg}
		}
	}
	return fmt.Errorf("%s: %w", op, err)
}
