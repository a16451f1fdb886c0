package attestation

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"sync"
	"time"
)

// maxCached is how many entries a cache holds.
const maxCached = 1024

// period is a span of time, both ends included.
type period struct {
	from, until time.Time
}

// validity is that of cert, widened by Skew.
func validity(cert *x509.Certificate) period {
	return period{cert.NotBefore.Add(-Skew), cert.NotAfter.Add(Skew)}
}

func (p period) contains(t time.Time) bool { return !t.Before(p.from) && !t.After(p.until) }

// and is the time that both share.
func (p period) and(q period) period {
	if q.from.After(p.from) {
		p.from = q.from
	}
	if q.until.Before(p.until) {
		p.until = q.until
	}
	return p
}

// cache is a bounded map from digests to what was verified, each for the period in which verifying it
// again would give the same result. It is safe for concurrent use.
type cache[V any] struct {
	mu      sync.Mutex
	entries map[[sha256.Size]byte]cached[V]
}

type cached[V any] struct {
	value V
	period
}

func (c *cache[V]) get(key [sha256.Size]byte, now time.Time) (value V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	entry, ok := c.entries[key]
	if !ok || !entry.contains(now) {
		return value, false
	}
	return entry.value, true
}

func (c *cache[V]) put(key [sha256.Size]byte, value V, p period, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries == nil {
		c.entries = map[[sha256.Size]byte]cached[V]{}
	}
	if _, ok := c.entries[key]; !ok {
		c.makeRoom(now)
	}
	c.entries[key] = cached[V]{value, p}
}

// makeRoom drops what has expired if the cache is full and, if that is not enough, all.
func (c *cache[V]) makeRoom(now time.Time) {
	if len(c.entries) < maxCached {
		return
	}
	for key, entry := range c.entries {
		if now.After(entry.until) {
			delete(c.entries, key)
		}
	}
	if len(c.entries) >= maxCached {
		clear(c.entries)
	}
}

// Chains remembers certificate chains, so that the next document of the same enclave costs the
// verification of one signature instead of five. A chain is used only while each of its certificates is
// valid, and only below the root with which it was verified; it is remembered when a whole document has
// passed. At most 1024 are kept. The zero value is empty and ready; it is safe for concurrent use.
type Chains struct {
	cache[chain]
}

// verify is verifyChain for the certificates of d; c may be nil.
func (c *Chains) verify(root *x509.Certificate, d *Document, now time.Time) (chain, error) {
	if c != nil {
		if ch, ok := c.get(chainDigest(root, d.CABundle, d.Certificate), now); ok {
			return ch, nil
		}
	}
	return verifyChain(root, d.CABundle, d.Certificate, now)
}

// remember keeps what verify returned for d; c may be nil.
func (c *Chains) remember(root *x509.Certificate, d *Document, ch chain, now time.Time) {
	if c != nil {
		c.put(chainDigest(root, d.CABundle, d.Certificate), ch, ch.valid, now)
	}
}

// chainDigest names a chain by all that verifyChain looks at.
func chainDigest(root *x509.Certificate, bundle [][]byte, leaf []byte) [sha256.Size]byte {
	h := sha256.New()
	add := func(der []byte) {
		var size [8]byte
		binary.BigEndian.PutUint64(size[:], uint64(len(der)))
		h.Write(size[:])
		h.Write(der)
	}
	add(root.Raw)
	for _, der := range bundle[1:] {
		add(der)
	}
	add(leaf)
	return [sha256.Size]byte(h.Sum(nil))
}
