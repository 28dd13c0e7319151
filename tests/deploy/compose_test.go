// Package deploy_test checks what stands in deploy/ with the tools that read
// it: compose files by Compose's own loader, manifests by kustomize's and by
// Kubernetes' types. It is a module of its own so that none of them is a
// dependency of what we ship.
package deploy_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

func compose(t *testing.T) *types.Project {
	t.Helper()
	o, err := cli.NewProjectOptions([]string{filepath.Join("..", "..", "deploy", "docker", "temporal-compose.yaml")},
		cli.WithEnv([]string{"POSTGRES_PASSWORD=a", "GRAFANA_PASSWORD=b"}), cli.WithResolvedPaths(true))
	if err != nil {
		t.Fatal(err)
	}
	p, err := o.LoadProject(t.Context()) // interpolates, and checks against Compose's schema
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestComposeFileIsValidAndComplete(t *testing.T) {
	p := compose(t)
	for _, name := range []string{"postgres", "temporal", "namespace", "ui", "worker", "prometheus", "grafana"} {
		if _, ok := p.Services[name]; !ok {
			t.Errorf("no service %s", name)
		}
	}
	for name, s := range p.Services {
		if s.Build == nil && !strings.Contains(s.Image, ":") {
			t.Errorf("%s: the image %q has no version", name, s.Image)
		}
		for _, port := range s.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("%s publishes port %s to everybody", name, port.Published)
			}
		}
		for _, v := range s.Volumes {
			if v.Type != types.VolumeTypeBind {
				continue
			}
			if _, err := os.Stat(v.Source); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if s.Privileged {
			t.Errorf("%s is privileged", name)
		}
	}
	published := func(service, container string) string {
		for _, port := range p.Services[service].Ports {
			if container == "" || container == strings.TrimSpace(port.Published) {
				return port.Published
			}
		}
		return ""
	}
	if published("ui", "8080") == "" || published("temporal", "7233") == "" {
		t.Error("the web page belongs on 8080, Temporal on 7233")
	}
}

func TestComposeFileRefusesToStartWithoutPasswords(t *testing.T) {
	o, err := cli.NewProjectOptions([]string{filepath.Join("..", "..", "deploy", "docker", "temporal-compose.yaml")}, cli.WithEnv([]string{"GRAFANA_PASSWORD=b"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.LoadProject(t.Context()); err == nil || !strings.Contains(err.Error(), "POSTGRES_PASSWORD") {
		t.Errorf("without a password: %v", err)
	}
}

// What Compose builds are stages of the Dockerfile, and what those copy from
// this repository is there.
func TestDockerfileHasWhatItNames(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "docker", "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	var stages []string
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		switch {
		case len(f) == 4 && f[0] == "FROM" && f[2] == "AS":
			stages = append(stages, f[3])
		case len(f) > 2 && f[0] == "COPY" && !strings.HasPrefix(f[1], "--"):
			for _, source := range f[1 : len(f)-1] {
				if _, err := os.Stat(filepath.Join("..", "..", source)); err != nil {
					t.Errorf("%s: %v", strings.TrimSpace(line), err)
				}
			}
		case len(f) > 2 && f[0] == "COPY" && strings.HasPrefix(f[1], "--from="):
			if from := strings.TrimPrefix(f[1], "--from="); !slices.Contains(stages, from) {
				t.Errorf("%s: no stage %s before it", strings.TrimSpace(line), from)
			}
		}
	}
	for name, s := range compose(t).Services {
		if s.Build != nil && !slices.Contains(stages, s.Build.Target) {
			t.Errorf("%s: the Dockerfile has no stage %q", name, s.Build.Target)
		}
	}
	final := string(text)[strings.LastIndex(string(text), "\nFROM "):]
	if !strings.Contains(final, "\nUSER 10001") || !strings.Contains(final, "sbom") {
		t.Error("the worker's image must have a user who is not root, and say what is in it")
	}
}
