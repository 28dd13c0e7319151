package metrics

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const deployed = "../../deploy"

// promtool runs Prometheus' own checker, which Debian's prometheus brings.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("there is no promtool: install Debian's prometheus")
	}
	if out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestAlertsFireWhenTheyShouldAndNotOtherwise(t *testing.T) {
	promtool(t, "check", "config", filepath.Join(deployed, "prometheus/prometheus.yml")) // and its rules
	promtool(t, "test", "rules", filepath.Join(deployed, "prometheus/alerts_test.yml"))
}

// words finds all that the expression finds in a file.
func words(t *testing.T, file, expression string) map[string]int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(deployed, file))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	for _, m := range regexp.MustCompile(expression).FindAllStringSubmatch(string(b), -1) {
		found[m[1]]++
	}
	if len(found) == 0 {
		t.Fatalf("%s holds nothing of %s", file, expression)
	}
	return found
}

func TestEveryAlertIsTestedBothWaysAndExplained(t *testing.T) {
	tested := words(t, "prometheus/alerts_test.yml", `alertname: (\w+)`)
	fires := words(t, "prometheus/alerts_test.yml", `alertname: (\w+)\n\s+exp_alerts:\n`)
	for alert := range words(t, "prometheus/alerts.yml", `- alert: (\w+)`) {
		if fires[alert] == 0 || fires[alert] == tested[alert] {
			t.Errorf("%s: of %d tests it fires in %d", alert, tested[alert], fires[alert])
		}
		if words(t, "../docs/watching.md", `(?m)^### (\w+)$`)[alert] != 1 {
			t.Errorf("docs/watching.md does not say what to do about %s", alert)
		}
		if words(t, "prometheus/alerts.yml", `runbook: docs/watching.md#(\w+)`)[strings.ToLower(alert)] != 1 {
			t.Errorf("%s does not lead to its page", alert)
		}
	}
}

// TestAlertsAndDocsNameWhatIsCounted finds the series of our own that nobody
// counts any more, and those that nobody told of.
func TestAlertsAndDocsNameWhatIsCounted(t *testing.T) {
	reg, m, sdk := everything(t)
	player{m, sdk}.fork(1)
	m.ActiveSandboxes(reg, func(context.Context) map[string]int { return map[string]int{"local": 1} })
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, f := range families {
		known[f.GetName()] = true
	}
	described := words(t, "../docs/watching.md", "`(sandbox_[a-z_]+)[{`]")
	for name := range known {
		if strings.HasPrefix(name, "sandbox_") && described[name] == 0 {
			t.Errorf("docs/watching.md does not tell of %s", name)
		}
	}
	for _, file := range []string{"prometheus/alerts.yml", "grafana/dashboards/sandbox-orchestration.json", "../docs/watching.md"} {
		for name := range words(t, file, `\b(sandbox_(?:fork|gateway|created?|active|orphans|cancel|build)_?[a-z_]*)\b`) {
			if !known[strings.TrimSuffix(name, "_bucket")] {
				t.Errorf("%s names %s, which nobody counts", file, name)
			}
		}
	}
}
