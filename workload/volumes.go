package workload

// validateVolumes checks mounts that show the same memory.
func (m *Manifest) validateVolumes(bad func(string, ...any)) {
	mounts := map[int][]Mount{} // by volume
	for _, v := range m.Mounts {
		if v.Kind == MountHost {
			if v.Volume != 0 {
				bad("mount %q: files of the host have no volume", v.Path)
			}
			continue
		}
		if v.Volume < 0 || v.Volume > len(mounts)+1 {
			bad("mount %q: volume %d must be the next number", v.Path, v.Volume)
			return
		}
		if v.Volume == 0 {
			if v.SubPath != "" {
				bad("mount %q: subPath must be left out when no other mount shows the volume", v.Path)
			}
			continue
		}
		mounts[v.Volume] = append(mounts[v.Volume], v)
	}
	for n, list := range mounts {
		if len(list) < 2 {
			bad("mount %q: no other mount has volume %d", list[0].Path, n)
		}
		for _, v := range list {
			if v.Kind != list[0].Kind || v.SizeLimit != list[0].SizeLimit {
				bad("mounts of volume %d differ in kind or sizeLimit", n)
			}
		}
	}
}
