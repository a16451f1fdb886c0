package main

import (
	"context"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podmetrics"
	"cloister.dev/cloister/internal/podsock"
)

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
	stats, err := s.pod.Stats(ctx, &channel.StatsRequest{})
	if err != nil {
		// Between two scrapes the run may have ended; what lasts shows in the state, and by the gap.
		s.log.Debug("ask for the enclave's counters", "error", err)
		stats = nil
	}
	return podmetrics.Of(state, stats)
}
