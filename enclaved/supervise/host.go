package supervise

import (
	"context"
	"log/slog"
	"path/filepath"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/enclaved/host"
	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

// deliverFiles writes the files that the host supplies, which have been checked, to where the workload finds
// them.
func (e *Enclave) deliverFiles(spec *process.Spec) (*host.Files, error) {
	files, err := host.Write(e.manifest, e.values, filepath.Join(e.cfg.Dir, "host"))
	e.values = nil
	if err != nil {
		return nil, err
	}
	for _, m := range e.manifest.Mounts {
		if m.Kind == workload.MountHost {
			spec.Binds = append(spec.Binds, process.Bind{Source: files.Source(m.Path), Target: m.Path, ReadOnly: true})
		}
	}
	return files, nil
}

// Update implements channel.EnclaveServer.
func (e *Enclave) Update(_ context.Context, r *channel.UpdateRequest) (*channel.UpdateResponse, error) {
	e.mu.Lock()
	files := e.files
	e.mu.Unlock()
	if files == nil {
		return nil, status.Error(codes.FailedPrecondition, "the workload has not been started")
	}
	if err := files.Update(r.GetMount()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	slog.Info("the host has changed files", "path", r.GetMount().GetPath(), "files", len(r.GetMount().GetFiles()))
	return &channel.UpdateResponse{}, nil
}
