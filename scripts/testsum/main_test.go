package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// sum runs the real go test over packages made of files (path -> text), and
// returns what testsum makes of it.
func sum(t *testing.T, files map[string]string) (text string, good bool) {
	t.Helper()
	dir := t.TempDir()
	files["go.mod"] = "module example.test/m\n\ngo 1.24\n"
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-json", "-count=1", "-vet=off", "./...")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=0")
	events, err := cmd.Output()
	if len(events) == 0 {
		t.Fatalf("go test printed nothing: %v", err)
	}
	var out bytes.Buffer
	s := newSummary(&out)
	if err := s.read(bytes.NewReader(events)); err != nil {
		t.Fatal(err)
	}
	good = s.close()
	return out.String(), good
}

const head = "package p\n\nimport \"testing\"\n\n"

func TestCountsSubtestsInsteadOfTheirParents(t *testing.T) {
	text, good := sum(t, map[string]string{
		"a/a_test.go": head + `
func TestOne(t *testing.T) {}
func TestRows(t *testing.T) {
	t.Run("x", func(*testing.T) {})
	t.Run("y", func(t *testing.T) { t.Run("z", func(t *testing.T) { t.Skip("no moon") }) })
}`,
		"b/b.go": "package b\n",
	})
	if !good {
		t.Error("a good run is called bad")
	}
	// TestOne, TestRows/x, and TestRows/y/z skipped.
	wantEnd(t, text, "2 passed, 0 failed, 1 skipped")
	wantLine(t, text, "skipped: example.test/m/a TestRows/y/z: a_test.go:9: no moon")
	wantLine(t, text, "ok  \texample.test/m/a")
}

func TestFailuresAreCountedOnceAndShownWhole(t *testing.T) {
	text, good := sum(t, map[string]string{
		"a/a_test.go": head + `
func TestGood(t *testing.T) { t.Log("nobody wants to see this") }
func TestBelow(t *testing.T) { t.Run("x", func(t *testing.T) { t.Error("the subtest broke") }) }
func TestAbove(t *testing.T) {
	t.Run("x", func(*testing.T) {})
	t.Error("the parent broke")
}`,
	})
	if good {
		t.Error("a bad run is called good")
	}
	// TestBelow/x and TestAbove failed; TestGood and TestAbove/x passed.
	wantEnd(t, text, "2 passed, 2 failed, 0 skipped")
	wantLine(t, text, "    a_test.go:7: the subtest broke")
	wantLine(t, text, "    a_test.go:10: the parent broke")
	wantLine(t, text, "FAIL\texample.test/m/a")
	if strings.Contains(text, "nobody wants") {
		t.Errorf("shows the output of a test that passed:\n%s", text)
	}
}

func TestWhatNeverCameToItsEndFailed(t *testing.T) {
	for _, row := range []struct{ name, file, says, end string }{
		{
			"does not compile", head + "func TestX(t *testing.T) { undefined() }",
			"undefined: undefined", "1 passed, 1 failed, 0 skipped",
		},
		{
			"panics", head + "func TestX(t *testing.T) { panic(\"oh no\") }\nfunc TestNeverReached(t *testing.T) {}",
			"panic: oh no", "1 passed, 1 failed, 0 skipped",
		},
		{
			"exits", "package p\n\nimport (\"os\"; \"testing\")\n\nfunc TestX(t *testing.T) { os.Exit(3) }",
			"--- FAIL: TestX never ended", "1 passed, 1 failed, 0 skipped",
		},
		{
			"fails in TestMain", "package p\n\nimport (\"os\"; \"testing\")\n\nfunc TestMain(m *testing.M) { m.Run(); os.Exit(1) }\nfunc TestX(t *testing.T) {}",
			"FAIL\texample.test/m/bad", "2 passed, 1 failed, 0 skipped",
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			text, good := sum(t, map[string]string{
				"bad/bad_test.go":   row.file,
				"good/good_test.go": head + "func TestY(t *testing.T) {}",
			})
			if good {
				t.Error("a bad run is called good")
			}
			if !strings.Contains(text, row.says) {
				t.Errorf("does not say %q:\n%s", row.says, text)
			}
			wantEnd(t, text, row.end)
		})
	}
}

func TestNoTestIsNoSuccess(t *testing.T) {
	text, good := sum(t, map[string]string{"a/a.go": "package a\n"})
	if good {
		t.Error("a run without tests is called good")
	}
	wantEnd(t, text, "0 passed, 0 failed, 0 skipped")
}

func TestARunOfSkipsIsNoSuccess(t *testing.T) {
	text, good := sum(t, map[string]string{"a/a_test.go": head + "func TestX(t *testing.T) { t.Skip() }"})
	if good {
		t.Error("a run in which every test was skipped is called good")
	}
	wantEnd(t, text, "0 passed, 0 failed, 1 skipped")
}

func TestARunThatIsCutOffFailed(t *testing.T) {
	var out bytes.Buffer
	s := newSummary(&out)
	err := s.read(strings.NewReader(`go: downloading a thing
{"Action":"start","Package":"m/a"}
{"Action":"run","Package":"m/a","Test":"TestX"}
{"Action":"pass","Package":"m/a","Test":"TestX"}
{"Action":"run","Package":"m/a","Test":"TestY"}
{"Action":"output","Package":"m/a","Test":"TestY","Output":"7 passed, 0 failed\n"}
{"Action":"outp`))
	if err != nil {
		t.Fatal(err)
	}
	if s.close() {
		t.Error("half a run is called good")
	}
	wantLine(t, out.String(), "go: downloading a thing")
	wantLine(t, out.String(), "FAIL\tm/a\tnever ended")
	wantEnd(t, out.String(), "1 passed, 1 failed, 0 skipped")
}

func TestKeepsTheEndOfALongOutput(t *testing.T) {
	var r record
	for range 100 {
		r.keep(strings.Repeat("x", 10_000) + "\n")
	}
	r.keep("the end")
	if len(r.output) != maxKept {
		t.Errorf("kept %d bytes, want %d", len(r.output), maxKept)
	}
	if !bytes.HasSuffix(r.output, []byte("the end")) {
		t.Error("the end is not kept")
	}
}

func wantEnd(t *testing.T, text, want string) {
	t.Helper()
	if !strings.HasSuffix(text, "\n"+want+"\n") {
		t.Errorf("the last line is not %q:\n%s", want, text)
	}
}

func wantLine(t *testing.T, text, prefix string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, prefix) {
			return
		}
	}
	t.Errorf("no line starts with %q:\n%s", prefix, text)
}
