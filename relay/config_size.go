package relay

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// ByteSize is a number of bytes. Its text form has a unit: 512B, 64KiB, 1.5MiB, 2GiB, 10MB.
type ByteSize int64

// Units of a [ByteSize].
const (
	KiB ByteSize = 1 << 10
	MiB ByteSize = 1 << 20
	GiB ByteSize = 1 << 30
)

// String is the shortest exact form with a binary unit.
func (b ByteSize) String() string {
	switch {
	case b != 0 && b%GiB == 0:
		return fmt.Sprintf("%dGiB", b/GiB)
	case b != 0 && b%MiB == 0:
		return fmt.Sprintf("%dMiB", b/MiB)
	case b != 0 && b%KiB == 0:
		return fmt.Sprintf("%dKiB", b/KiB)
	}
	return fmt.Sprintf("%dB", int64(b))
}

// ParseByteSize reads the text form. A bare number is refused: it does not say of what.
func ParseByteSize(s string) (ByteSize, error) {
	number := strings.TrimRight(s, "BKMGi")
	unit, ok := map[string]ByteSize{"B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "KB": 1e3, "MB": 1e6, "GB": 1e9}[s[len(number):]]
	value, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if !ok || err != nil || !(math.Abs(value*float64(unit)) < 1<<53) {
		return 0, errors.New("write a number and a unit of B, KiB, MiB, GiB, KB, MB or GB, such as 64MiB")
	}
	return ByteSize(value * float64(unit)), nil
}
