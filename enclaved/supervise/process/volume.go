package process

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/workload"
)

// mountTmpfs mounts memory of its own at target, as an emptyDir writable for everybody.
func mountTmpfs(s *Spec, m workload.Mount, target string) error {
	size := m.SizeLimit
	if size == 0 {
		size = s.MountSize
	}
	flags := uintptr(unix.MS_NODEV)
	if m.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	return unix.Mount("tmpfs", target, "tmpfs", flags, fmt.Sprintf("mode=777,size=%d", size))
}

// sharedVolumes makes the memory that more than one mount shows, and returns what each of mounts is to
// show, nil where it has memory of its own.
func sharedVolumes(s *Spec, mounts []workload.Mount) ([]*os.File, error) {
	shown := make([]*os.File, len(mounts))
	// For as long as it has no place of its own. A clone of a mount that is nowhere is not to be had.
	const stage = "/dev/volume"
	for i, first := range mounts {
		if first.Volume == 0 || shown[i] != nil {
			continue
		}
		if err := os.Mkdir(stage, 0o755); err != nil {
			return nil, err
		}
		whole := first
		whole.ReadOnly = false
		if err := mountTmpfs(s, whole, stage); err != nil {
			return nil, fmt.Errorf("mount a tmpfs for %s: %w", first.Path, err)
		}
		for j, m := range mounts {
			if m.Volume != first.Volume {
				continue
			}
			// Nothing is in it yet that could lead elsewhere. Umask is 0.
			dir := filepath.Join(stage, m.SubPath)
			if err := os.MkdirAll(dir, 0o777); err != nil {
				return nil, err
			}
			fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
			if err != nil {
				return nil, fmt.Errorf("open the volume of %s: %w", m.Path, err)
			}
			shown[j] = os.NewFile(uintptr(fd), m.Path)
		}
		if err := unix.Unmount(stage, unix.MNT_DETACH); err != nil {
			return nil, err
		}
		if err := os.Remove(stage); err != nil {
			return nil, err
		}
	}
	return shown, nil
}

// attachVolume mounts what sharedVolumes has returned.
func attachVolume(tree *os.File, m workload.Mount) error {
	defer tree.Close()
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, m.Path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return err
	}
	if !m.ReadOnly {
		return nil
	}
	return unix.MountSetattr(unix.AT_FDCWD, m.Path, 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}
