package attestation

import "fmt"

// Rule is a group of checks, named in every refusal.
type Rule string

// The rules, in the order in which Verify applies them.
const (
	RuleFormat      Rule = "format"      // CBOR, COSE_Sign1 and the document's fields
	RuleAge         Rule = "age"         // the document's time and Options.MaxAge
	RuleChain       Rule = "chain"       // certificates up to the pinned root, and their validity
	RuleSignature   Rule = "signature"   // the signature over the document
	RuleNonce       Rule = "nonce"       // Options.Nonce
	RuleUserData    Rule = "user_data"   // Options.UserData
	RulePublicKey   Rule = "public_key"  // Options.PublicKey, or the key of the TLS certificate
	RuleDebug       Rule = "debug"       // Options.AllowDebug
	RuleMeasurement Rule = "measurement" // Options.Measurements
	RuleCertificate Rule = "certificate" // the TLS certificate that carries the document
)

// Error is a refusal: the rule that failed and why. An *Error with RuleMeasurement wraps a
// *workload.MismatchError.
type Error struct {
	Rule Rule
	Err  error
}

func (e *Error) Error() string { return fmt.Sprintf("attestation refused (%s): %v", e.Rule, e.Err) }

func (e *Error) Unwrap() error { return e.Err }

// refuse makes an *Error from a format as fmt.Errorf takes it.
func refuse(rule Rule, format string, args ...any) error {
	return &Error{Rule: rule, Err: fmt.Errorf(format, args...)}
}
