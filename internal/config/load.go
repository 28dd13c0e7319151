package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const op = "configuration"

// maxFile bounds the configuration file, in bytes.
const maxFile = 1 << 20

// A Flag is a flag that the user has given. An empty value is a value: it
// overrides what the file says.
type Flag struct {
	Name   string // without dashes, as "ui-port"
	Values []string
}

// Load reads the environment through getenv, the file that it names, and the
// flags that were given. A flag that is none of ours is a bug of the caller;
// anything else that is wrong is a fault of kind Invalid that names the flag,
// the variable or the file's key, and says what would be right.
func Load(getenv func(string) string, flags ...Flag) (*Config, error) {
	l := loader{getenv: getenv, given: map[string]given{}}
	path, source, err := l.path(flags)
	if err != nil {
		return nil, err
	}
	c := &Config{}
	found, err := l.file(path, source)
	if err != nil {
		return nil, err
	}
	if found {
		c.File = path
	}
	for _, k := range keys {
		if v := strings.TrimSpace(getenv(k.env)); k.env != "" && v != "" {
			l.given[k.name] = given{[]string{v}, "environment " + k.env}
		}
	}
	for _, f := range flags {
		i := slices.IndexFunc(keys, func(k key) bool { return k.flag == f.Name })
		switch {
		case f.Name == configFlag:
		case i < 0:
			return nil, fault.New(op, fault.Internal, "no setting belongs to the flag --%s", f.Name)
		default:
			l.given[keys[i].name] = given{f.Values, "flag --" + f.Name}
		}
	}
	for _, k := range keys {
		g, ok := l.given[k.name]
		if !ok {
			g = given{k.standard, standardSource}
			if k.name == "home" {
				if g.values, err = l.standardHome(); err != nil {
					return nil, err
				}
			}
		}
		if err := l.set(c, k, g); err != nil {
			return nil, err
		}
		c.settings = append(c.settings, Setting{k.name, k.show(c), g.source})
	}
	return c, nil
}

// given is a value as somebody wrote it.
type given struct {
	values []string
	source string
}

type loader struct {
	getenv func(string) string
	given  map[string]given // by the name of the key
}

// set parses g into c.
func (l *loader) set(c *Config, k key, g given) error {
	if !k.list && len(g.values) != 1 {
		return fault.New(op, fault.Invalid, "%s: one value is needed, %d are given", where(k, g), len(g.values))
	}
	if err := k.set(c, l, g.values); err != nil {
		return fault.New(op, fault.Invalid, "%s: %w", where(k, g), err).Hinted("%s", k.hint)
	}
	return nil
}

// where names the place that a user has to look at.
func where(k key, g given) string {
	if file, ok := strings.CutPrefix(g.source, "file "); ok {
		return fmt.Sprintf("%q in %s", k.name, file)
	}
	_, name, _ := strings.Cut(g.source, " ")
	if name == "" {
		return fmt.Sprintf("%q", k.name)
	}
	return name
}

const (
	configFlag = "config"
	configEnv  = "SANDBOX_TEMPORAL_CONFIG"
	folder     = "sandbox-temporal" // ours, in the folders of the XDG base directory specification
)

// path says which file to read, and who named it; it has to be there when
// somebody did.
func (l *loader) path(flags []Flag) (path, source string, err error) {
	path, source = strings.TrimSpace(l.getenv(configEnv)), configEnv
	for _, f := range flags {
		if f.Name == configFlag && len(f.Values) == 1 && f.Values[0] != "" {
			path, source = f.Values[0], "--"+configFlag
		}
	}
	if path != "" {
		if path, err = l.absolute(path); err != nil {
			return "", "", fault.New(op, fault.Invalid, "%s: %w", source, err)
		}
		return path, source, nil
	}
	base := l.getenv("XDG_CONFIG_HOME")
	if !filepath.IsAbs(base) { // the specification: a relative one is ignored
		home := l.getenv("HOME")
		if home == "" {
			return "", "", nil
		}
		base = filepath.Join(home, ".config")
	}
	return filepath.Join(base, folder, "config.toml"), "", nil
}

func (l *loader) standardHome() ([]string, error) {
	if base := l.getenv("XDG_STATE_HOME"); filepath.IsAbs(base) {
		return []string{filepath.Join(base, folder)}, nil
	}
	if home := l.getenv("HOME"); home != "" {
		return []string{filepath.Join(home, ".local", "state", folder)}, nil
	}
	return nil, fault.New(op, fault.Invalid, "there is no place for state: neither SANDBOX_TEMPORAL_HOME nor HOME is set").
		Hinted("Set SANDBOX_TEMPORAL_HOME to a folder.")
}

// absolute makes a path of the user independent of the working directory: the
// engine has another one.
func (l *loader) absolute(path string) (string, error) {
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		home := l.getenv("HOME")
		if home == "" {
			return "", errors.New(`"~" needs HOME to be set`)
		}
		path = filepath.Join(home, rest)
	}
	if strings.ContainsRune(path, 0) {
		return "", errors.New("a path cannot hold a NUL byte")
	}
	return filepath.Abs(path)
}

// file reads the values of the file at path and reports whether there is one.
func (l *loader) file(path, source string) (bool, error) {
	if path == "" {
		return false, nil
	}
	text, err := read(path)
	if errors.Is(err, fs.ErrNotExist) && source == "" {
		return false, nil
	}
	if err != nil {
		e := fault.New(op, fault.Invalid, "%w", err)
		if source != "" {
			e.Hint = "Correct the path that " + source + " gives."
		}
		return false, e
	}
	tree := map[string]any{}
	if _, err := toml.Decode(text, &tree); err != nil {
		var parse toml.ParseError
		if errors.As(err, &parse) {
			return false, fault.New(op, fault.Invalid, "%s, line %d: %s", path, parse.Position.Line, parse.Message).
				Hinted("The file is TOML: see https://toml.io.")
		}
		return false, fault.New(op, fault.Invalid, "%s: %w", path, err)
	}
	return true, l.values(path, "", tree)
}

func read(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return "", err
	}
	if len(b) > maxFile {
		return "", fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	return string(b), nil
}

// values takes the values of one table; prefix is its name and a dot.
func (l *loader) values(path, prefix string, table map[string]any) error {
	for _, name := range slices.Sorted(maps.Keys(table)) {
		full, value := prefix+name, table[name]
		if sub, ok := value.(map[string]any); ok && isTable(full) {
			if err := l.values(path, full+".", sub); err != nil {
				return err
			}
			continue
		}
		if index(full) < 0 {
			e := fault.New(op, fault.Invalid, "%s: there is no setting %q", path, full)
			if near := nearest(full); near != "" {
				return e.Hinted("Did you mean %q?", near)
			}
			return e.Hinted("The settings are: %s.", strings.Join(names(), ", "))
		}
		words, ok := keys[index(full)].words(value)
		if !ok {
			return fault.New(op, fault.Invalid, "%q in %s: the value is of the wrong type", full, path).
				Hinted("%s", keys[index(full)].hint)
		}
		l.given[full] = given{words, "file " + path}
	}
	return nil
}

// words writes a value of TOML as a user would write it in a flag, and reports
// whether it is of a type that the key takes.
func (k key) words(value any) ([]string, bool) {
	if list, ok := value.([]any); ok || k.list {
		words := make([]string, 0, len(list))
		for _, e := range list {
			s, ok := e.(string)
			if !ok {
				return nil, false
			}
			words = append(words, s)
		}
		return words, ok && k.list
	}
	switch v := value.(type) {
	case string:
		return []string{v}, true
	case bool:
		return []string{strconv.FormatBool(v)}, !k.text
	case int64:
		return []string{strconv.FormatInt(v, 10)}, !k.text
	case float64:
		// The shortest decimal that is this float: for an amount of money,
		// what was written in the file.
		return []string{strconv.FormatFloat(v, 'f', -1, 64)}, !k.text
	}
	return nil, false
}
