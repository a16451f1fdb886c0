package kmsemu

import "testing"

func TestPolicy(t *testing.T) {
	const who = "arn:aws:iam::111122223333:role/web"
	gate := `{"Effect":"Allow","Principal":"*","Action":"kms:Decrypt","Condition":{"StringEqualsIgnoreCase":{"kms:RecipientAttestation:PCR16":["aa","bb"],"kms:RecipientAttestation:PCR0":"00"}}}`
	attested := map[string]string{"kms:RecipientAttestation:PCR16": "BB", "kms:RecipientAttestation:PCR0": "00"}
	for name, tt := range map[string]struct {
		statements string
		action     string
		context    map[string]string
		want       bool
	}{
		"nothing allows":          {`{"Effect":"Allow","Principal":"*","Action":"kms:Encrypt"}`, "kms:Decrypt", attested, false},
		"attested":                {gate, "kms:Decrypt", attested, true},
		"another action":          {gate, "kms:Encrypt", attested, false},
		"no document":             {gate, "kms:Decrypt", nil, false},
		"one register differs":    {gate, "kms:Decrypt", map[string]string{"kms:RecipientAttestation:PCR16": "aa", "kms:RecipientAttestation:PCR0": "01"}, false},
		"somebody else":           {`{"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::111122223333:role/other"},"Action":"kms:*"}`, "kms:Decrypt", nil, false},
		"default policy":          {`{"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::111122223333:root"},"Action":"kms:*"}`, "kms:Decrypt", nil, true},
		"another account":         {`{"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::444455556666:root"},"Action":"kms:*"}`, "kms:Decrypt", nil, false},
		"deny wins":               {gate + `,{"Effect":"Deny","Principal":"*","Action":"kms:*"}`, "kms:Decrypt", attested, false},
		"negated without a value": {`{"Effect":"Allow","Principal":"*","Action":"kms:Decrypt","Condition":{"StringNotEqualsIgnoreCase":{"kms:RecipientAttestation:PCR16":"aa"}}}`, "kms:Decrypt", nil, true},
		"deny without a document": {`{"Effect":"Allow","Principal":"*","Action":"kms:*"},{"Effect":"Deny","Principal":"*","Action":"kms:Decrypt","Condition":{"Null":{"kms:RecipientAttestation:PCR16":"true"}}}`, "kms:Decrypt", nil, false},
		"deny, with a document":   {`{"Effect":"Allow","Principal":"*","Action":"kms:*"},{"Effect":"Deny","Principal":"*","Action":"kms:Decrypt","Condition":{"Null":{"kms:RecipientAttestation:PCR16":"true"}}}`, "kms:Decrypt", attested, true},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := parsePolicy(`{"Version":"2012-10-17","Statement":[` + tt.statements + `]}`)
			if err != nil {
				t.Fatal(err)
			}
			if got := p.allows(who, tt.action, tt.context); got != tt.want {
				t.Errorf("allows: %v", got)
			}
		})
	}
	for _, text := range []string{"", "{}", `{"Statement":[{"Effect":"Maybe","Principal":"*","Action":"kms:*"}]}`,
		`{"Statement":[{"Effect":"Allow","Principal":"*","Action":"kms:*","Condition":{"IpAddress":{}}}]}`} {
		if _, err := parsePolicy(text); err == nil {
			t.Errorf("%s was taken", text)
		}
	}
}
