package relay

import (
	"slices"
	"strconv"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
)

// Verification says whether and how the relay verifies endpoints: sets their is_verified, and takes it back when their URL changes.
type Verification struct {
	// Method is one of delivery.VerifyNone, VerifyHead and VerifyChallenge. With VerifyNone is_verified is the application's business.
	Method string `mapstructure:"method"`
	// Schedule is the waits before each further try of an endpoint whose first one, at once, has failed. Empty: that one is all.
	Schedule []time.Duration `mapstructure:"schedule"`
}

func (v Verification) on() bool { return v.Method != delivery.VerifyNone }

// VerificationMethods are those that verify something.
func VerificationMethods() []string { return []string{delivery.VerifyHead, delivery.VerifyChallenge} }

func (v Verification) validate(f *faults) {
	if v.on() && !slices.Contains(VerificationMethods(), v.Method) {
		f.add("verification.method", strconv.Quote(v.Method), "must be none, head or challenge")
	}
	for _, wait := range v.Schedule {
		atLeast(f, "verification.schedule", wait, time.Second)
	}
}
