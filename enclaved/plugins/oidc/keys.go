package oidc

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	// refreshEvery is how often the issuer's keys are fetched: a key that it has withdrawn is refused
	// after that.
	refreshEvery = 5 * time.Minute
	// maxAge is for how long keys are used when the issuer cannot be reached. The host can keep us from
	// reaching it, and with that a withdrawn key alive, but no longer.
	maxAge = time.Hour
	// pause is the least time between two fetches that tokens with unknown keys cause: anybody can make
	// such tokens.
	pause = 10 * time.Second
	// Fetches that fail are tried again after firstRetry, doubling to lastRetry.
	firstRetry = time.Second
	lastRetry  = 30 * time.Second

	fetchTimeout = 10 * time.Second
	maxDocument  = 1 << 20 // bytes
	maxKeys      = 100
	minRSA       = 2048 // bits (RFC 7518, section 3.3)
)

// key is a public key of the issuer's.
type key struct {
	id        string // empty when it has none
	algorithm string // empty when it does not say
	public    crypto.PublicKey
}

// fits tells whether the key can have made a signature of the algorithm: a key is used for one algorithm
// family only (RFC 8725, section 3.1).
func (k key) fits(algorithm string) bool {
	if k.algorithm != "" {
		return k.algorithm == algorithm
	}
	switch p := k.public.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(algorithm, "RS") || strings.HasPrefix(algorithm, "PS")
	case *ecdsa.PublicKey:
		return map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[p.Curve.Params().BitSize] == algorithm
	case ed25519.PublicKey:
		return algorithm == "EdDSA"
	}
	return false
}

// keySet holds the issuer's keys and keeps them fresh.
type keySet struct {
	fetch func(context.Context) ([]key, error)
	wake  chan struct{} // one token: fetch now

	mu      sync.Mutex
	keys    []key
	fetched time.Time     // of keys; zero before the first
	tried   time.Time     // when the last fetch ended
	next    chan struct{} // closed when the next fetch has ended
}

func newKeySet(fetch func(context.Context) ([]key, error)) *keySet {
	return &keySet{fetch: fetch, wake: make(chan struct{}, 1), next: make(chan struct{})}
}

// run fetches until ctx ends, and tells whether there are keys that may be used.
func (s *keySet) run(ctx context.Context, serving func(bool)) {
	retry := firstRetry
	for ctx.Err() == nil {
		keys, err := s.fetch(ctx)
		s.mu.Lock()
		s.tried = time.Now()
		if err == nil {
			s.keys, s.fetched = keys, s.tried
		}
		close(s.next)
		s.next = make(chan struct{})
		usable := !s.fetched.IsZero() && time.Since(s.fetched) < maxAge
		s.mu.Unlock()
		serving(usable)
		wait := refreshEvery
		if err != nil {
			slog.Warn("fetch the issuer's keys", "error", err)
			wait, retry = retry, min(2*retry, lastRetry)
		} else {
			retry = firstRetry
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-s.wake:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// find returns the keys that a token with this key id, which may be empty, and this algorithm can have been
// signed with. An unknown id makes it fetch the keys again, but not too often, and waits for them half of
// the time that ctx leaves: the answer that there is no such key must still be in time.
func (s *keySet) find(ctx context.Context, id, algorithm string) ([]key, error) {
	found, next, err := s.look(id, algorithm)
	if len(found) > 0 || err != nil || next == nil {
		return found, err
	}
	select {
	case s.wake <- struct{}{}:
	default: // somebody has asked already
	}
	var late <-chan time.Time
	if deadline, ok := ctx.Deadline(); ok {
		late = time.After(time.Until(deadline) / 2)
	}
	select {
	case <-next:
	case <-late:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	found, _, err = s.look(id, algorithm)
	return found, err
}

// look finds keys; where there are none and it is time to fetch again, next is closed after that.
func (s *keySet) look(id, algorithm string) (found []key, next <-chan struct{}, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fetched.IsZero() || time.Since(s.fetched) >= maxAge {
		return nil, nil, errors.New("the issuer's keys are not known, or too old to be trusted")
	}
	for _, k := range s.keys {
		if (id == "" || k.id == id) && k.fits(algorithm) {
			found = append(found, k)
		}
	}
	if id == "" && len(found) > 1 {
		return nil, nil, nil // a token must say which (OpenID Connect Core 1.0, section 10.1)
	}
	if len(found) == 0 && time.Since(s.tried) >= pause {
		next = s.next
	}
	return found, next, nil
}

// fetchKeys asks the issuer where its keys are (OpenID Connect Discovery 1.0, section 4) and for the keys
// (RFC 7517, section 5).
func fetchKeys(ctx context.Context, client *http.Client, issuer string) ([]key, error) {
	b, err := get(ctx, client, strings.TrimSuffix(issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return nil, fmt.Errorf("discover the issuer: %w", err)
	}
	var discovered struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(b, &discovered); err != nil {
		return nil, errors.New("discover the issuer: its document is not JSON")
	}
	// Section 4.3: anything else could be another issuer's document.
	if discovered.Issuer != issuer {
		return nil, fmt.Errorf("discover the issuer: it calls itself %q and the configuration %q", discovered.Issuer, issuer)
	}
	if u, err := url.Parse(discovered.Keys); err != nil || u.Scheme != "https" {
		return nil, fmt.Errorf("discover the issuer: its jwks_uri %q is not an https URL", discovered.Keys)
	}
	if b, err = get(ctx, client, discovered.Keys); err != nil {
		return nil, fmt.Errorf("get the issuer's keys: %w", err)
	}
	return parseKeys(b)
}

func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json")
	res, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers with status %d", url, res.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, maxDocument+1))
	if err == nil && len(b) > maxDocument {
		err = fmt.Errorf("%s is larger than %d bytes", url, maxDocument)
	}
	return b, err
}

// parseKeys reads a JWK set and keeps the public keys for signatures. Keys of a kind that is not known, and
// those that are too weak, are left out, as RFC 7517, section 5, says.
func parseKeys(b []byte) ([]key, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(b, &set); err != nil {
		return nil, errors.New("the issuer's key set is not JSON")
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("the issuer's key set has %d keys, at most %d are taken", len(set.Keys), maxKeys)
	}
	var out []key
	for _, raw := range set.Keys {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(raw) != nil || !k.IsPublic() || k.Use != "" && k.Use != "sig" {
			continue
		}
		if p, ok := k.Key.(*rsa.PublicKey); ok && p.N.BitLen() < minRSA {
			continue
		}
		out = append(out, key{id: k.KeyID, algorithm: k.Algorithm, public: k.Key})
	}
	if len(out) == 0 {
		return nil, errors.New("the issuer's key set has no key for signatures that can be used")
	}
	return out, nil
}
