package podmetrics

import (
	"bytes"
	"context"
	"flag"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podsock"
)

var update = flag.Bool("update", false, "rewrite the goldens")

// scrape is what a scraper of s gets.
func scrape(s Snapshot) []byte {
	w := httptest.NewRecorder()
	Handler(func(context.Context) Snapshot { return s }).ServeHTTP(w, httptest.NewRequest("GET", Path, nil))
	return w.Body.Bytes()
}

func TestRoundTrip(t *testing.T) {
	state := func(phase podsock.EnclaveState_Phase, lastError string) *podsock.EnclaveState {
		return &podsock.EnclaveState{Generation: 3, Phase: phase, Progress: &channel.Progress{Step: "preparing the image", Error: lastError}}
	}
	stats := &channel.StatsResponse{MemoryUsed: 90 << 20, MemoryTotal: 256 << 20, CpuSeconds: 1.25, RequestsTotal: 1 << 40, Inflight: 2, NsmCallsTotal: 7}
	for name, tt := range map[string]struct {
		state *podsock.EnclaveState
		stats *channel.StatsResponse
		want  Snapshot
	}{
		"no-initboot":     {nil, nil, Snapshot{}},
		"booting-again":   {state(podsock.EnclaveState_PHASE_BOOTING, "no"), nil, Snapshot{Phase: podsock.EnclaveState_PHASE_BOOTING, Generation: 3, StepFailed: true}},
		"booted":          {state(podsock.EnclaveState_PHASE_BOOTED, ""), nil, Snapshot{Phase: podsock.EnclaveState_PHASE_BOOTED, Generation: 3, Attested: true}},
		"waits-for-image": {state(podsock.EnclaveState_PHASE_STARTING, "no"), stats, Snapshot{Phase: podsock.EnclaveState_PHASE_STARTING, Generation: 3, Attested: true, StepFailed: true, Stats: stats}},
		"running":         {state(podsock.EnclaveState_PHASE_RUNNING, ""), stats, Snapshot{Phase: podsock.EnclaveState_PHASE_RUNNING, Generation: 3, Attested: true, Stats: stats}},
		"ended":           {state(podsock.EnclaveState_PHASE_ENDED, "lost"), nil, Snapshot{Phase: podsock.EnclaveState_PHASE_ENDED, Generation: 3}},
	} {
		t.Run(name, func(t *testing.T) {
			text := scrape(Of(tt.state, tt.stats))
			golden := filepath.Join("testdata", name+".txt")
			if *update {
				if err := os.WriteFile(golden, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(text)); diff != "" {
				t.Error(diff)
			}
			got, err := Parse(bytes.NewReader(text))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	good := string(scrape(Snapshot{Phase: podsock.EnclaveState_PHASE_RUNNING, Generation: 1, Stats: &channel.StatsResponse{}}))
	for name, tt := range map[string]struct{ text, want string }{
		"nothing":        {"", "cloister_enclave_generation is missing"},
		"HTML":           {"<html>", "is missing"},
		"two phases":     {strings.Replace(good, `{phase="booted"} 0`, `{phase="booted"} 1`, 1), "two phases"},
		"a phase less":   {strings.Replace(good, `{phase="running"}`, `{phase="jogging"}`, 1), "lacks the phase running"},
		"no generation":  {strings.ReplaceAll(good, "cloister_enclave_generation", "x"), "cloister_enclave_generation"},
		"negative":       {strings.Replace(good, "generation 1", "generation -1", 1), "cloister_enclave_generation"},
		"not a number":   {strings.Replace(good, "generation 1", "generation NaN", 1), "cloister_enclave_generation"},
		"infinite":       {strings.Replace(good, "generation 1", "generation +Inf", 1), "cloister_enclave_generation"},
		"twice":          {good + good, "twice"},
		"without an end": {strings.Repeat("# x\n", maxSize), "more than"},
		"one long line":  {"# " + strings.Repeat("x", maxSize), "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := Parse(strings.NewReader(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
	t.Run("a counter is missing", func(t *testing.T) {
		s, err := Parse(strings.NewReader(strings.ReplaceAll(good, "cloister_enclave_nsm_calls_total", "x")))
		if err != nil || s.Stats != nil {
			t.Errorf("%+v, %v", s, err)
		}
	})
}

// FuzzParse: what is accepted is written and read back as the same.
func FuzzParse(f *testing.F) {
	f.Add(scrape(Snapshot{}))
	f.Add(scrape(Snapshot{Phase: podsock.EnclaveState_PHASE_RUNNING, Generation: 2, Attested: true, Stats: &channel.StatsResponse{MemoryUsed: 1, CpuSeconds: 0.5}}))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := Parse(bytes.NewReader(text))
		if err != nil {
			return
		}
		again, err := Parse(bytes.NewReader(scrape(s)))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(s, again, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
	})
}
