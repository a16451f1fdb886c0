package gateway

import (
	"bytes"
	"math/rand/v2"
	"net"
	"testing"
)

// recorder keeps what is written to it.
type recorder struct {
	net.Conn
	bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) { return r.Buffer.Write(p) }
func (r *recorder) Read(p []byte) (int, error)  { return r.Buffer.Read(p) }

// FuzzGoAway writes frames in pieces of any size and asks the client to leave somewhere between: GOAWAY
// must come once, after the first frame, between two frames and never in a field block.
func FuzzGoAway(f *testing.F) {
	for seed := range uint64(50) {
		f.Add(seed, uint16(seed*7))
	}
	f.Fuzz(func(t *testing.T, seed uint64, when uint16) {
		random := rand.New(rand.NewPCG(seed, 0))
		var whole []byte
		legal := map[int]bool{} // offsets at which GOAWAY may stand
		block := false
		add := func(typ, flags byte) {
			payload := make([]byte, random.IntN(40))
			whole = append(whole, 0, 0, byte(len(payload)), typ, flags, 0, 0, 0, 1)
			for range payload {
				whole = append(whole, byte(random.Uint32()))
			}
			if typ == 1 || typ == 5 || typ == 9 {
				block = flags&4 == 0
			}
			if !block {
				legal[len(whole)] = true
			}
		}
		add(4, 0)
		for range 1 + random.IntN(8) {
			switch random.IntN(4) {
			case 0:
				add(0, byte(random.IntN(2)))
			case 1:
				add(1, 4)
			case 2:
				add(1, 0)
				for range random.IntN(3) {
					add(9, 0)
				}
				add(9, 4)
			case 3:
				add(8, 4)
			}
		}
		at := int(when) % (len(whole) + 1)

		out := &recorder{}
		c := &h2Conn{Conn: out}
		write := func(p []byte) {
			for len(p) > 0 {
				n := 1 + random.IntN(len(p))
				if m, err := c.Write(p[:n]); m != n || err != nil {
					t.Fatalf("wrote %d of %d: %v", m, n, err)
				}
				p = p[n:]
			}
		}
		write(whole[:at])
		c.leave()
		write(whole[at:])

		got := out.Bytes()
		place := bytes.Index(got, goAway)
		if place < at || !legal[place] {
			t.Fatalf("asked at %d, told at %d, legal at %v", at, place, legal)
		}
		for offset := range legal {
			if offset >= at && offset < place {
				t.Errorf("asked at %d, told at %d and not at %d", at, place, offset)
			}
		}
		if rest := append(bytes.Clone(got[:place]), got[place+len(goAway):]...); !bytes.Equal(rest, whole) {
			t.Error("the other frames have changed")
		}
	})
}
