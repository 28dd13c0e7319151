package cli

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A choice is a flag with a few possible values.
type choice struct {
	value   *string
	allowed []string
}

// newChoice sets value to the first of the allowed ones.
func newChoice(value *string, allowed ...string) *choice {
	*value = allowed[0]
	return &choice{value, allowed}
}

var _ pflag.Value = (*choice)(nil)

func (c *choice) String() string { return *c.value }
func (c *choice) Type() string   { return strings.Join(c.allowed, "|") }

func (c *choice) Set(s string) error {
	if !slices.Contains(c.allowed, s) {
		return fmt.Errorf("use one of: %s", strings.Join(c.allowed, ", "))
	}
	*c.value = s
	return nil
}

// A number is an int flag that says what it wants in plain words.
type number int

var _ pflag.Value = (*number)(nil)

func newNumber(value *int, start int) *number {
	*value = start
	return (*number)(value)
}

func (n *number) String() string { return strconv.Itoa(int(*n)) }
func (n *number) Type() string   { return "int" }

func (n *number) Set(s string) error {
	v, err := strconv.Atoi(s)
	if errors.Is(err, strconv.ErrRange) {
		return errors.New("that is out of range")
	}
	if err != nil {
		return errors.New("want a whole number")
	}
	*n = number(v)
	return nil
}

// outputFlag adds -o.
func outputFlag(cmd *cobra.Command, value *string) {
	cmd.Flags().VarP(newChoice(value, "table", "json"), "output", "o", "how to print the result")
}

// flagError turns what pflag says into a usage error with a next step.
func flagError(root *cobra.Command, args []string) func(*cobra.Command, error) error {
	return func(cmd *cobra.Command, err error) error {
		if errors.Is(err, pflag.ErrHelp) {
			return err
		}
		// "frok --prompt x": the word is wrong, not the flag, which only
		// the misspelt command would have known.
		if cmd == root && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			return unknownCommand(root, args[0])
		}
		hint := fmt.Sprintf("See: %s --help", cmd.CommandPath())
		var unknown *pflag.NotExistError
		var value *pflag.InvalidValueError
		var none *pflag.ValueRequiredError
		switch {
		case errors.As(err, &unknown) && unknown.GetSpecifiedShortnames() == "":
			name := unknown.GetSpecifiedName()
			if near := nearestFlag(cmd, name); near != "" {
				hint = fmt.Sprintf("Did you mean --%s? %s", near, hint)
			}
			return usage(hint, "%s has no flag --%s", cmd.CommandPath(), name)
		case errors.As(err, &unknown):
			return usage(hint, "%s has no flag -%s", cmd.CommandPath(), unknown.GetSpecifiedName())
		case errors.As(err, &value):
			return usage(hint, "--%s %q: %v", value.GetFlag().Name, value.GetValue(), value.Unwrap())
		case errors.As(err, &none):
			return usage(hint, "--%s needs a value", none.GetFlag().Name)
		}
		return fault.New("", fault.Invalid, "%w", err).Hinted("%s", hint)
	}
}

// nearestFlag returns the flag of cmd that is nearly called name, or "".
func nearestFlag(cmd *cobra.Command, name string) string {
	best, least := "", 3
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if d := fault.Distance(f.Name, name); !f.Hidden && d < least {
			best, least = f.Name, d
		}
	})
	return best
}

// args wants exactly the named arguments.
func args(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, got []string) error {
		hint := fmt.Sprintf("See: %s --help", cmd.CommandPath())
		switch {
		case len(got) < len(names):
			return usage(hint, "%s wants %s", cmd.CommandPath(), names[len(got)])
		case len(got) > len(names):
			return usage(hint+"\nPut quotes around text that has spaces.", "%s does not know what to do with %q", cmd.CommandPath(), got[len(names)])
		}
		return nil
	}
}
