package delivery

import "fmt"

// FieldError is one fault in an endpoint's row or in the configuration.
type FieldError struct {
	// Field is the column or the configuration key.
	Field string
	// Value is what was found, already redacted: a secret or a header's value never appears, of a URL only scheme and host. Empty: there is none to show.
	Value string
	// Remedy says what would do.
	Remedy string
}

func (e *FieldError) Error() string {
	if e.Value == "" {
		return e.Field + ": " + e.Remedy
	}
	return fmt.Sprintf("%s %s: %s", e.Field, e.Value, e.Remedy)
}

// faults collects FieldErrors, so that all are reported at once.
type faults []error

func (f *faults) add(field, value, remedy string) {
	*f = append(*f, &FieldError{Field: field, Value: value, Remedy: remedy})
}

// check adds a fault unless ok.
func (f *faults) check(ok bool, field string, value any, remedy string) {
	if !ok {
		f.add(field, fmt.Sprint(value), remedy)
	}
}
