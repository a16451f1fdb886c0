package oci

import (
	"strings"
	"testing"
)

// What a registry gives is of the digest that was measured, but who pushed it may have meant harm.
func FuzzOCI(f *testing.F) {
	const digest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	d := strings.NewReplacer("DIGEST", `"digest":"`+digest+`"`)
	for _, seed := range []string{
		`{"schemaVersion":2,"config":{DIGEST,"size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",DIGEST,"size":3}]}`,
		`{"schemaVersion":2,"config":{DIGEST,"size":-1},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar",DIGEST}]}`,
		`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",DIGEST,"size":3,"platform":{"os":"linux","architecture":"amd64"}},null]}`,
		`{"schemaVersion":2,"manifests":[],"layers":[]}`,
		`{"schemaVersion":2,"manifests":null,"config":null}`,
		`{"os":"linux","architecture":"amd64","config":{"Env":["A=b"],"Entrypoint":["/a"],"User":"a:b","StopSignal":"9"},"rootfs":{"diff_ids":["` + digest + `"]}}`,
		`{"os":"linux","architecture":"amd64","config":null,"rootfs":{"diff_ids":["x"]}}`,
	} {
		f.Add([]byte(d.Replace(seed)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		check := func(of string, d Descriptor, most int64) {
			if !digestRE.MatchString(d.Digest) || d.Size < 0 || d.Size > most {
				t.Errorf("%s is %+v", of, d)
			}
		}
		m, err := ParseManifest(b)
		switch {
		case err != nil:
		case m.Manifests != nil:
			if m.Config != nil || m.Layers != nil {
				t.Error("it is an index and an image at once")
			}
			if d, err := m.Choose("linux/amd64"); err == nil {
				check("the chosen image", d, MaxManifest)
			}
		default:
			check("the config", *m.Config, MaxConfig)
			if n := len(m.Layers); n < 1 || n > maxLayers {
				t.Errorf("it has %d layers", n)
			}
			for _, l := range m.Layers {
				check("a layer", l, 1<<63-1)
				if _, ok := Layers[l.MediaType]; !ok {
					t.Errorf("a layer is of the type %q", l.MediaType)
				}
			}
		}
		if c, err := ParseConfig(b, "linux/amd64", 1); err == nil && (len(c.RootFS.DiffIDs) != 1 || !digestRE.MatchString(c.RootFS.DiffIDs[0])) {
			t.Errorf("the config has the diff_ids %q", c.RootFS.DiffIDs)
		}
	})
}
