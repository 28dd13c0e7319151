package mini

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func use(t *testing.T, box *toolbox, name string, input map[string]any) (string, bool) {
	t.Helper()
	return box.run(t.Context(), name, mustJSON(input))
}

func TestWhatAToolSaysIsBounded(t *testing.T) {
	dir := t.TempDir()
	box := newToolbox(dir, dir)
	if err := os.WriteFile(filepath.Join(dir, "wide"), []byte(strings.Repeat("ü", 1<<20)+"\nsecond\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "long"), []byte(strings.Repeat("line\n", 1<<16)), 0o600); err != nil {
		t.Fatal(err)
	}
	text, failed := use(t, box, "Bash", map[string]any{"command": "echo first; seq 200000; echo last"})
	if failed || len(text) > maxResult || !strings.HasPrefix(text, "first\n") || !strings.HasSuffix(text, "\nlast") || !strings.Contains(text, "bytes left out") {
		t.Errorf("%v, %d bytes", failed, len(text))
	}
	for _, name := range []string{"wide", "long"} {
		text, failed := use(t, box, "Read", map[string]any{"file_path": name})
		if failed || len(text) > maxResult {
			t.Errorf("%s: %v, %d bytes", name, failed, len(text))
		}
	}
	if text, _ := use(t, box, "Read", map[string]any{"file_path": "wide", "offset": 2}); text != "2\tsecond\n" {
		t.Errorf("%q", text)
	}
	if text, _ := use(t, box, "Read", map[string]any{"file_path": "long", "offset": 7, "limit": 2}); text != "7\tline\n8\tline\n" {
		t.Errorf("%q", text)
	}
}

func TestBadCallsAreAnsweredAndNotObeyed(t *testing.T) {
	dir := t.TempDir()
	box := newToolbox(dir, dir)
	if err := os.WriteFile(filepath.Join(dir, "twice"), []byte("a a"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		tool, input, want string
	}{
		{"Grep", `{}`, `no tool "Grep"`},
		{"Bash", `{"command":7}`, "cannot unmarshal"},
		{"Bash", ``, "unexpected end"},
		{"Bash", `{"command":"sleep 60","timeout":50}`, "timed out"},
		{"Bash", `{"command":"kill -9 $$"}`, "Exit code 137"},
		{"Read", `{"file_path":"nothere"}`, "no such file"},
		{"Read", `{"file_path":"pipe"}`, "not a regular file"},
		{"Read", `{"file_path":"."}`, "not a regular file"},
		{"Write", `{"file_path":"x"}`, "required"},
		{"Edit", `{"file_path":"twice","old_string":"a","new_string":"b"}`, "2 matches"},
		{"Edit", `{"file_path":"twice","old_string":"z","new_string":"b"}`, "not found"},
		{"Edit", `{"file_path":"twice","old_string":"","new_string":"b"}`, "old_string must be"},
	} {
		text, failed := box.run(t.Context(), row.tool, json.RawMessage(row.input))
		if !failed || !strings.Contains(text, row.want) {
			t.Errorf("%s %s: %v, %q", row.tool, row.input, failed, text)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "twice")); err != nil || string(b) != "a a" {
		t.Errorf("%q, %v", b, err)
	}
	if text, failed := use(t, box, "Edit", map[string]any{"file_path": "twice", "old_string": "a", "new_string": "b", "replace_all": true}); failed {
		t.Error(text)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "twice")); err != nil || string(b) != "b b" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestWhatACommandLeavesBehindDoesNotHoldItUp(t *testing.T) {
	dir := t.TempDir()
	box := newToolbox(dir, dir)
	w := &world{t: t, dir: dir}
	w.sleeper() // for its cleanup
	text, failed := use(t, box, "Bash", map[string]any{"command": "sleep 600 & echo $! >pid; echo started"})
	if failed || text != "started" || !w.sleeps() {
		t.Errorf("%v, %q", failed, text)
	}
}
