package mini

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// The bounds of the tools.
const (
	maxResult      = 64 << 10 // bytes that the model gets to see of one call
	maxEdited      = 16 << 20 // bytes of a file that can be edited
	defaultTimeout = 2 * time.Minute
	longestTimeout = 10 * time.Minute
	// pipeGrace is how long output is waited for after a command ended: what
	// it left in the background may hold its output open for ever.
	pipeGrace = time.Second
)

// A tool is something that the model can do. It returns what the model gets
// to read, and whether it failed.
type tool struct {
	name        string
	description string
	schema      string // JSON schema of the input
	run         func(ctx context.Context, input json.RawMessage) (string, error)
}

// A failure is what the model gets to read of a call that failed.
type failure string

func (f failure) Error() string { return string(f) }

func failed(format string, args ...any) error { return failure(fmt.Sprintf(format, args...)) }

// A toolbox is the tools of one session.
type toolbox struct {
	dir   string
	home  string
	shell string
	tools []tool
}

func newToolbox(dir, home string) *toolbox {
	t := &toolbox{dir: dir, home: home, shell: "sh"}
	if bash, err := exec.LookPath("bash"); err == nil {
		t.shell = bash
	}
	t.tools = []tool{
		{"Bash", "Runs a shell command in the working directory and returns its output.", `{"type":"object","required":["command"],"properties":{` +
			`"command":{"type":"string"},"timeout":{"type":"number","description":"milliseconds, at most 600000"},"description":{"type":"string"}}}`, t.bash},
		{"Read", "Returns a text file with numbered lines.", `{"type":"object","required":["file_path"],"properties":{` +
			`"file_path":{"type":"string"},"offset":{"type":"number","description":"first line, from 1"},"limit":{"type":"number","description":"most lines"}}}`, t.read},
		{"Write", "Writes a file, and the folders it is in.", `{"type":"object","required":["file_path","content"],"properties":{` +
			`"file_path":{"type":"string"},"content":{"type":"string"}}}`, t.write},
		{"Edit", "Replaces a text in a file. old_string must occur exactly once, unless replace_all is set.", `{"type":"object","required":["file_path","old_string","new_string"],"properties":{` +
			`"file_path":{"type":"string"},"old_string":{"type":"string"},"new_string":{"type":"string"},"replace_all":{"type":"boolean"}}}`, t.edit},
	}
	return t
}

func (t *toolbox) names() []string {
	var names []string
	for _, tool := range t.tools {
		names = append(names, tool.name)
	}
	return names
}

// definitions is the API's "tools".
func (t *toolbox) definitions() json.RawMessage {
	type definition struct {
		Name        string          `json:"name"`
		Description string          `json:"description"`
		Schema      json.RawMessage `json:"input_schema"`
	}
	var all []definition
	for _, tool := range t.tools {
		all = append(all, definition{tool.name, tool.description, json.RawMessage(tool.schema)})
	}
	return mustJSON(all)
}

// run carries out one call and returns what the model gets to read.
func (t *toolbox) run(ctx context.Context, name string, input json.RawMessage) (text string, bad bool) {
	i := slices.IndexFunc(t.tools, func(tool tool) bool { return tool.name == name })
	if i < 0 {
		return fmt.Sprintf("There is no tool %q.", name), true
	}
	text, err := t.tools[i].run(ctx, input)
	if err != nil {
		text = err.Error()
	}
	if clipped, cut := clip(text, maxResult-64); cut {
		text = clipped + "\n… (cut)"
	}
	return strings.ToValidUTF8(text, "\ufffd"), err != nil
}

func (t *toolbox) path(p string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(t.dir, p)
}

func (t *toolbox) bash(ctx context.Context, input json.RawMessage) (string, error) {
	var in struct {
		Command string  `json:"command"`
		Timeout float64 `json:"timeout"`
	}
	if err := json.Unmarshal(input, &in); err != nil {
		return "", err
	}
	timeout := defaultTimeout
	if in.Timeout > 0 {
		timeout = time.Duration(min(in.Timeout, float64(longestTimeout/time.Millisecond)) * float64(time.Millisecond))
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out := &excerpt{limit: maxResult - 1<<10}
	cmd := exec.CommandContext(ctx, t.shell, "-c", in.Command)
	cmd.Dir, cmd.Env = t.dir, environ(t.home)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = pipeGrace
	err := cmd.Run()
	text := strings.TrimRight(out.String(), "\n")
	exit := (*exec.ExitError)(nil)
	switch {
	case ctx.Err() != nil:
		return "", failed("Command timed out after %s\n%s", timeout, text)
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return text, nil
	case errors.As(err, &exit):
		code := exit.ExitCode()
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			code = 128 + int(ws.Signal())
		}
		return "", failed("Exit code %d\n%s", code, text)
	}
	return "", err
}

func (t *toolbox) read(_ context.Context, input json.RawMessage) (string, error) {
	var in struct {
		Path   string `json:"file_path"`
		Offset int    `json:"offset"`
		Limit  int    `json:"limit"`
	}
	if err := json.Unmarshal(input, &in); err != nil {
		return "", err
	}
	f, err := openRegular(t.path(in.Path))
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	var b strings.Builder
	lines := bufio.NewReader(f)
	for n := 1; in.Limit <= 0 || n < max(in.Offset, 1)+in.Limit; n++ {
		line, long, err := lines.ReadLine()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
		if n >= in.Offset {
			fmt.Fprintf(&b, "%d\t%s\n", n, line)
		}
		for long && err == nil { // the rest of a line that is too long to show
			_, long, err = lines.ReadLine()
		}
		if b.Len() > maxResult {
			break
		}
	}
	return b.String(), nil
}

// openRegular opens what can be read to its end: a pipe or a device may have
// none.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = failed("%s is not a regular file", path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (t *toolbox) write(_ context.Context, input json.RawMessage) (string, error) {
	var in struct {
		Path    string  `json:"file_path"`
		Content *string `json:"content"`
	}
	if err := json.Unmarshal(input, &in); err != nil {
		return "", err
	}
	if in.Path == "" || in.Content == nil {
		return "", failed("file_path and content are required")
	}
	path := t.path(in.Path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(path, []byte(*in.Content), 0o644); err != nil {
		return "", err
	}
	return "File written: " + in.Path, nil
}

func (t *toolbox) edit(_ context.Context, input json.RawMessage) (string, error) {
	var in struct {
		Path string `json:"file_path"`
		Old  string `json:"old_string"`
		New  string `json:"new_string"`
		All  bool   `json:"replace_all"`
	}
	if err := json.Unmarshal(input, &in); err != nil {
		return "", err
	}
	path := t.path(in.Path)
	f, err := openRegular(path)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxEdited+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	n := bytes.Count(b, []byte(in.Old))
	switch {
	case len(b) > maxEdited:
		return "", failed("%s has more than %d bytes", in.Path, maxEdited)
	case in.Old == "" || in.Old == in.New:
		return "", failed("old_string must be some text, and another one than new_string")
	case n == 0:
		return "", failed("String to replace not found in %s.", in.Path)
	case n > 1 && !in.All:
		return "", failed("Found %d matches of old_string in %s: give more of its surroundings, or set replace_all.", n, in.Path)
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(b, []byte(in.Old), []byte(in.New)), 0o644); err != nil {
		return "", err
	}
	return fmt.Sprintf("The file %s has been updated.", in.Path), nil
}

// An excerpt keeps the beginning and the end of what is written to it. A
// command's two streams may be written to it side by side.
type excerpt struct {
	limit int

	mu   sync.Mutex
	head []byte
	tail []byte
	lost int
}

func (e *excerpt) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(p)
	take := min(e.limit/2-len(e.head), len(p))
	e.head = append(e.head, p[:take]...)
	e.tail = append(e.tail, p[take:]...)
	if over := len(e.tail) - e.limit/2; over > 0 {
		e.lost += over
		e.tail = append(e.tail[:0], e.tail[over:]...)
	}
	return n, nil
}

func (e *excerpt) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lost == 0 {
		return string(e.head) + string(e.tail)
	}
	return fmt.Sprintf("%s\n… (%d bytes left out) …\n%s", e.head, e.lost, e.tail)
}

// clip shortens s to at most limit bytes, between runes.
func clip(s string, limit int) (string, bool) {
	if len(s) <= limit {
		return s, false
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit], true
}

func hasAnyPrefix(s string, prefixes ...string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s, p) })
}
