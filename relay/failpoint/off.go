//go:build !failpoints

package failpoint

// Hit does nothing.
func Hit(Point) {}

// Planted is false.
func Planted(Bug) bool { return false }
