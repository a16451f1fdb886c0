package main

import (
	"context"
	"time"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podmetrics"
	"cloister.dev/cloister/internal/podsock"
)

// statsAge is for how long the enclave's counters are not asked for again. Whoever reaches the pod can ask
// here, and each answer makes the enclave look at all of its processes.
const statsAge = time.Second

// snapshot is what /metrics says: the state that initboot has reported, and the enclave's counters while
// it has a run.
func (s *sidecar) snapshot(ctx context.Context) podmetrics.Snapshot {
	s.mu.Lock()
	state := s.state
	s.mu.Unlock()
	switch state.GetPhase() {
	case podsock.EnclaveState_PHASE_STARTING, podsock.EnclaveState_PHASE_RUNNING, podsock.EnclaveState_PHASE_DRAINING:
	default:
		return podmetrics.Of(state, nil)
	}
	s.askStats.Lock()
	defer s.askStats.Unlock()
	if s.statsOf == state && time.Since(s.statsAt) < statsAge {
		return podmetrics.Of(state, s.stats)
	}
	stats, err := s.pod.Stats(ctx, &channel.StatsRequest{})
	if err != nil {
		// Between two scrapes the run may have ended; what lasts shows in the state, and by the gap.
		s.log.Debug("ask for the enclave's counters", "error", err)
		stats = nil
	}
	s.statsOf, s.stats, s.statsAt = state, stats, time.Now()
	return podmetrics.Of(state, stats)
}
