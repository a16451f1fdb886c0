package supervise

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/enclaved/image"
	"cloister.dev/cloister/enclaved/plugin"
	"cloister.dev/cloister/workload"
)

// startPlugins starts the plugins that are processes; nil when there are none. Their images come from the
// content server as the workload's does.
func (e *Enclave) startPlugins(ctx context.Context, progress func(step, failure string)) (*plugin.Set, error) {
	dir := filepath.Join(e.cfg.Dir, "plugins")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	return plugin.Start(ctx, plugin.Config{
		Manifest: e.manifest, Dir: dir, Self: e.cfg.Self, Children: e.cfg.Children,
		Image: func(ctx context.Context, want workload.Image, root string, progress func(step, failure string)) (*image.Config, error) {
			// What the workload's image has left.
			var st unix.Statfs_t
			if err := unix.Statfs(root, &st); err != nil {
				return nil, fmt.Errorf("look for free memory: %w", err)
			}
			f := image.NewFetcher(e.dialContent, progress)
			defer f.Close()
			return f.Image(ctx, want, root, filepath.Join(e.cfg.Dir, "layers"), min(e.cfg.Memory, int64(st.Bavail)*st.Bsize))
		},
		Dial: e.relay.Dial, Progress: progress,
	})
}
