package inject

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/webhook/config"
	"cloister.dev/cloister/workload"
)

// plugins returns the manifest's plugins and, in their order, the references of their images.
func plugins(cfg *config.EnclaveConfig, platform string) (list []workload.Plugin, images []string) {
	for _, c := range cfg.Plugins {
		p := c.Plugin
		if p.Image != nil {
			p.Image = &workload.Image{Digest: p.Image.Digest, Platform: platform}
			images = append(images, c.Reference)
		}
		list = append(list, p)
	}
	return list, images
}

// pluginWarnings says what plugins leave open.
func pluginWarnings(m *workload.Manifest) []string {
	var out []string
	for _, p := range m.Plugins {
		if p.Type == workload.PluginAuthentication && !p.Required {
			out = append(out, fmt.Sprintf("plugin %s is not required: while it is down requests pass unchecked, and the host can bring that about", p.Name))
		}
	}
	return out
}

// pluginImagesEnv is initboot's environment of where to fetch the plugins' images; their digests alone are measured.
func pluginImagesEnv(images []string) []corev1.EnvVar {
	if len(images) == 0 {
		return nil
	}
	return []corev1.EnvVar{{Name: podenv.EnvPluginImages, Value: escape(string(jsonText(images)))}}
}

// readPluginImages reads that back. Each must have the digest that the manifest has at its place.
func (p *problems) readPluginImages(path *field.Path, c *corev1.Container, m *workload.Manifest) []string {
	var images []string
	for _, e := range c.Env {
		if e.Name == podenv.EnvPluginImages && e.ValueFrom == nil {
			if err := json.Unmarshal([]byte(unescape(e.Value)), &images); err != nil {
				p.forbid(path.Child("env").Key(podenv.EnvPluginImages), "it is not a list of images")
				return nil
			}
			break
		}
	}
	var want []string
	for _, plugin := range m.Plugins {
		if plugin.Image != nil {
			want = append(want, plugin.Image.Digest)
		}
	}
	var got []string
	for _, image := range images {
		got = append(got, config.Digest(image))
	}
	if !slices.Equal(got, want) {
		p.forbid(path.Child("env").Key(podenv.EnvPluginImages), "it does not name the images of the workload manifest's plugins")
	}
	return images
}

// comparePlugins reports a config whose plugins were changed after the manifest was made from it.
func (p *problems) comparePlugins(at *field.Path, cfg *config.EnclaveConfig, m *workload.Manifest) {
	if want, _ := plugins(cfg, m.Image.Platform); !reflect.DeepEqual(want, m.Plugins) {
		p.forbid(at.Child("plugins"), "they are not what was injected")
	}
}

// manifestErrors is what is wrong with a whole manifest.
func manifestErrors(path *field.Path, err error) field.ErrorList {
	var out field.ErrorList
	for _, e := range config.Unjoin(err) {
		out = append(out, field.Invalid(path, field.OmitValueType{}, e.Error()))
	}
	return out
}
