package kmsemu

import (
	"encoding/json"
	"slices"
	"strings"
)

// policy is a key policy (IAM user guide, "Grammar of the IAM JSON policy language").
type policy struct {
	Statement []statement
}

type statement struct {
	Effect    string
	Principal principal
	Action    texts
	Condition map[string]map[string]texts
}

// texts is one text or a list of them.
type texts []string

func (t *texts) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*t = texts{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(t))
}

// principal is "*" or {"AWS": …}.
type principal struct{ arns texts }

func (p *principal) UnmarshalJSON(b []byte) error {
	var all string
	if json.Unmarshal(b, &all) == nil {
		p.arns = texts{all}
		return nil
	}
	var of struct{ AWS texts }
	err := json.Unmarshal(b, &of)
	p.arns = of.AWS
	return err
}

// operators tell whether a condition holds for a key's value; absent is when the request has none. A
// negated one holds then (IAM user guide, "Condition operators").
var operators = map[string]func(value string, present bool, wanted texts) bool{
	"StringEquals": func(v string, present bool, wanted texts) bool { return present && slices.Contains(wanted, v) },
	"StringEqualsIgnoreCase": func(v string, present bool, wanted texts) bool {
		return present && slices.ContainsFunc(wanted, func(w string) bool { return strings.EqualFold(w, v) })
	},
	"StringNotEquals": func(v string, present bool, wanted texts) bool { return !present || !slices.Contains(wanted, v) },
	"StringNotEqualsIgnoreCase": func(v string, present bool, wanted texts) bool {
		return !present || !slices.ContainsFunc(wanted, func(w string) bool { return strings.EqualFold(w, v) })
	},
	"Null": func(_ string, present bool, wanted texts) bool {
		return slices.Contains(wanted, "true") != present
	},
}

func parsePolicy(text string) (policy, error) {
	var p policy
	if err := json.Unmarshal([]byte(text), &p); err != nil || len(p.Statement) == 0 {
		return p, fail("MalformedPolicyDocumentException", "the policy has no statements: %v", err)
	}
	for _, s := range p.Statement {
		if s.Effect != "Allow" && s.Effect != "Deny" || len(s.Principal.arns) == 0 || len(s.Action) == 0 {
			return p, fail("MalformedPolicyDocumentException", "a statement lacks Effect, Principal or Action")
		}
		for operator := range s.Condition {
			if operators[operator] == nil {
				return p, fail("MalformedPolicyDocumentException", "the operator %s is not emulated", operator)
			}
		}
	}
	return p, nil
}

// allows tells whether some statement allows what none denies.
func (p policy) allows(arn, action string, context map[string]string) bool {
	allowed := false
	for _, s := range p.Statement {
		if !s.matches(arn, action, context) {
			continue
		}
		if s.Effect == "Deny" {
			return false
		}
		allowed = true
	}
	return allowed
}

func (s statement) matches(arn, action string, context map[string]string) bool {
	account := strings.Split(arn, ":")
	is := func(p string) bool {
		return p == "*" || p == arn || len(account) > 4 && p == "arn:aws:iam::"+account[4]+":root"
	}
	if !slices.ContainsFunc(s.Principal.arns, is) {
		return false
	}
	if !slices.Contains(s.Action, action) && !slices.Contains(s.Action, "kms:*") {
		return false
	}
	for operator, keys := range s.Condition {
		for key, wanted := range keys {
			value, present := context[key]
			if !operators[operator](value, present, wanted) {
				return false
			}
		}
	}
	return true
}
