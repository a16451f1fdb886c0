package supervise

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/internal/channel"
)

// Stats implements channel.EnclaveServer.
func (e *Enclave) Stats(context.Context, *channel.StatsRequest) (*channel.StatsResponse, error) {
	u, err := e.usage.Read()
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	out := &channel.StatsResponse{MemoryUsed: u.MemoryUsed, MemoryTotal: u.MemoryTotal, CpuSeconds: u.CPU.Seconds()}
	e.mu.Lock()
	g, v := e.gateway, e.vault
	e.mu.Unlock()
	if g != nil {
		out.RequestsTotal, out.Inflight = g.Requests()
	}
	if v != nil {
		out.NsmCallsTotal = v.Calls()
	}
	return out, nil
}
