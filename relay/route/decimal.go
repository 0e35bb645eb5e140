package route

import "bytes"

// decimal is a JSON number, kept as it is written so that no digit is lost: 0.d₁d₂d₃… × 10^exp, the first and the last digit not 0.
type decimal struct {
	negative bool
	exp      int64
	digits   []byte // may hold a point; empty for zero
}

// maxExponent is far beyond what PostgreSQL's numeric holds. A number beyond it is equal to nothing and not comparable.
const maxExponent = 1 << 40

// parseDecimal reads the token of a JSON number. The decimal refers to the token.
func parseDecimal(token []byte) (d decimal, ok bool) {
	if len(token) > 0 && token[0] == '-' {
		d.negative = true
		token = token[1:]
	}
	mantissa, shift := token, int64(0)
	point, first := -1, -1
	for i, c := range token {
		if c == 'e' || c == 'E' {
			if shift, ok = parseExponent(token[i+1:]); !ok {
				return decimal{}, false
			}
			mantissa = token[:i]
			break
		}
		switch {
		case c == '.' && point < 0:
			point = i
		case c < '0' || c > '9':
			return decimal{}, false
		case c != '0' && first < 0:
			first = i
		}
	}
	if first < 0 {
		return decimal{}, len(mantissa) > 0
	}
	if point < 0 {
		point = len(mantissa)
	}
	d.exp = int64(point-first) + shift
	if first > point {
		d.exp++
	}
	d.digits = bytes.TrimRight(mantissa[first:], "0.")
	return d, shift < maxExponent && shift > -maxExponent
}

// parseExponent stops counting at maxExponent.
func parseExponent(text []byte) (n int64, ok bool) {
	negative := false
	if len(text) > 0 && (text[0] == '+' || text[0] == '-') {
		negative = text[0] == '-'
		text = text[1:]
	}
	for _, c := range text {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = min(n*10+int64(c-'0'), maxExponent)
	}
	if negative {
		n = -n
	}
	return n, len(text) > 0
}

// compare returns -1, 0 or 1.
func (d decimal) compare(o decimal) int {
	switch s, t := d.sign(), o.sign(); {
	case s < t:
		return -1
	case s > t:
		return 1
	case s < 0:
		return o.compareSize(d)
	}
	return d.compareSize(o)
}

func (d decimal) sign() int {
	switch {
	case len(d.digits) == 0:
		return 0
	case d.negative:
		return -1
	}
	return 1
}

// compareSize compares the absolute values of two numbers that are both zero or both not.
func (d decimal) compareSize(o decimal) int {
	if d.exp != o.exp {
		if d.exp < o.exp {
			return -1
		}
		return 1
	}
	a, b := d.digits, o.digits
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0] == '.':
			a = a[1:]
		case b[0] == '.':
			b = b[1:]
		case a[0] < b[0]:
			return -1
		case a[0] > b[0]:
			return 1
		default:
			a, b = a[1:], b[1:]
		}
	}
	return min(len(a), 1) - min(len(b), 1)
}
