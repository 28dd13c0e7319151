package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A storedBase is a base and where it is.
type storedBase struct {
	provider string
	snap     sandbox.Snapshotter
	sandbox.BaseInfo
}

// storedBases returns all bases of this host, newest first.
func storedBases(ctx context.Context, env *Env) ([]storedBase, error) {
	if env.Providers == nil {
		return nil, missing("provider")
	}
	set, err := env.Providers(env.Globals)
	if err != nil {
		return nil, err
	}
	var all []storedBase
	for _, name := range set.Names() {
		snap, ok := sandbox.As[sandbox.Snapshotter](set[name])
		if !ok {
			continue
		}
		if gated, ok := sandbox.As[sandbox.Gated](set[name]); ok && gated.Ready(ctx) != nil {
			continue // without a key there is nobody to ask
		}
		infos, err := snap.Bases(ctx)
		if err != nil {
			return nil, err
		}
		for _, i := range infos {
			all = append(all, storedBase{name, snap, i})
		}
	}
	slices.SortStableFunc(all, func(a, b storedBase) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.Key, b.Key))
	})
	return all, nil
}

// baseHelp is the end of the help of all commands about bases.
const baseHelp = `

Bases live on the host of the worker. These commands see those of the state
folder on this host.`

type basesOptions struct{ Output string }

// newBases makes the "bases" command, which is also "bases list".
func newBases(env *Env) *cobra.Command {
	cmd := newBasesList(env, nil)
	cmd.Use, cmd.GroupID = "bases", groupService
	cmd.Example = "  sandbox-temporal bases\n  sandbox-temporal bases prune --dry-run"
	list := cmd.RunE
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, words []string) error {
		if len(words) > 0 {
			return unknownCommand(cmd, words[0])
		}
		return list(cmd, words)
	}
	cmd.AddCommand(newBasesList(env, nil), newBasesPrune(env, nil), newBasesRemove(env, nil))
	return cmd
}

func newBasesList(env *Env, run func(context.Context, *Env, basesOptions) error) *cobra.Command {
	if run == nil {
		run = runBases
	}
	var opts basesOptions
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List what forks start from",
		Long: `Bases lists the prepared file systems that forks start from, newest first: what
they were made from, when a sandbox was last started from them, how much of the
disk they take, and how many sandboxes and other bases stand on them now.` + baseHelp + exits(exitOK, exitFailed, exitUsage),
		Example: "  sandbox-temporal bases list -o json",
		Args:    args(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), env, opts) },
	}
	outputFlag(cmd, &opts.Output)
	return cmd
}

// listedBase is what "-o json" prints of a base.
type listedBase struct {
	Key        string     `json:"key"`
	Provider   string     `json:"provider"`
	Repository string     `json:"repository"`
	Branch     string     `json:"branch"`
	Commit     string     `json:"commit"`
	Run        string     `json:"run"` // that it was made for
	Created    time.Time  `json:"created"`
	Used       *time.Time `json:"used"` // null: never
	Bytes      int64      `json:"bytes"`
	Layers     int        `json:"layers"`
	Users      int        `json:"users"`
	Damaged    bool       `json:"damaged"`
}

func listed(b storedBase) listedBase {
	l := listedBase{
		Key: b.Key, Provider: b.provider, Repository: b.Labels[sandbox.LabelRepository], Branch: b.Labels[sandbox.LabelBranch],
		Commit: b.Labels[sandbox.LabelCommit], Run: b.Labels[sandbox.LabelRun],
		Created: b.Created, Bytes: b.Bytes, Layers: b.Layers, Users: b.Users, Damaged: b.Damaged,
	}
	if !b.Used.IsZero() {
		l.Used = &b.Used
	}
	return l
}

func runBases(ctx context.Context, env *Env, opts basesOptions) error {
	bases, err := storedBases(ctx, env)
	if err != nil {
		return err
	}
	if opts.Output == "json" {
		return writeBases(env, bases)
	}
	if len(bases) == 0 {
		fmt.Fprintf(env.Stderr, "There is no base yet. Make one with: %s prepare\n", program)
		return nil
	}
	now := env.Now()
	var rows [][]cell
	for _, b := range bases {
		used, users, colour := "never", fmt.Sprint(b.Users), plain
		if !b.Used.IsZero() {
			used = age(now, b.Used)
		}
		if b.Damaged {
			users, colour = users+", damaged", red
		}
		rows = append(rows, []cell{
			{shortKey(b.Key, bases), colour}, {fit(flat(b.Labels[sandbox.LabelRepository]), 50), plain}, {shortCommit(b.Labels[sandbox.LabelCommit]), plain},
			{age(now, b.Created), plain}, {used, plain}, {byteText(b.Bytes), plain}, {users, colour},
		})
	}
	return writeTable(env.Stdout, env.paintFor(env.Stdout), []column{
		{"KEY", false}, {"REPOSITORY", false}, {"COMMIT", false}, {"CREATED", true}, {"USED", true}, {"SIZE", true}, {"USERS", false},
	}, rows)
}

func writeBases(env *Env, bases []storedBase) error {
	list := []listedBase{} // scripts find a list, not null
	for _, b := range bases {
		list = append(list, listed(b))
	}
	return writeJSON(env.Stdout, list)
}

// keyPrefix begins the keys of the bases that runs prepare. It need not be
// written.
const keyPrefix = "base-"

// shortKey is the beginning of the key that no other base has.
func shortKey(key string, all []storedBase) string {
	for n := len(keyPrefix) + 8; n < len(key); n++ {
		hits := 0
		for _, b := range all {
			if strings.HasPrefix(b.Key, key[:n]) {
				hits++
			}
		}
		if hits <= 1 {
			return flat(key[:n])
		}
	}
	return flat(key)
}

func shortCommit(id string) string { return flat(id[:min(len(id), 12)]) }

// byteText shows a number of bytes, rounded.
func byteText(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, u := float64(n)/1024, 0
	for v >= 1023.95 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[u])
}

// byteFlag is a flag that takes a size, or 0.
type byteFlag int64

var _ pflag.Value = (*byteFlag)(nil)

func newByteFlag(value *int64, start int64) *byteFlag {
	*value = start
	return (*byteFlag)(value)
}

func (b *byteFlag) String() string {
	if *b == 0 {
		return "0"
	}
	return fork.FormatBytes(int64(*b))
}

func (b *byteFlag) Type() string { return "SIZE" }

func (b *byteFlag) Set(s string) error {
	if s == "0" {
		*b = 0
		return nil
	}
	n, err := fork.ParseBytes(s)
	if err != nil {
		return errors.New("want a size with a unit, as 500MB or 20GiB")
	}
	*b = byteFlag(n)
	return nil
}

// spanFlag is a flag that takes a length of time; days are allowed too.
type spanFlag time.Duration

var _ pflag.Value = (*spanFlag)(nil)

func newSpanFlag(value *time.Duration, start time.Duration) *spanFlag {
	*value = start
	return (*spanFlag)(value)
}

func (d *spanFlag) String() string {
	if h := time.Duration(*d); h > 0 && h%time.Hour == 0 {
		return fmt.Sprintf("%dh", h/time.Hour)
	}
	return time.Duration(*d).String()
}

func (d *spanFlag) Type() string { return "DURATION" }

func (d *spanFlag) Set(s string) error {
	const most = 100 * 366 * 24 * time.Hour
	v, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok && err != nil {
		var n int
		n, err = strconv.Atoi(days)
		v = time.Duration(min(max(n, -1), 100*366+1)) * 24 * time.Hour
	}
	if err != nil {
		return errors.New("want a length of time, as 90m, 168h or 7d")
	}
	if v < 0 || v > most {
		return errors.New("that is out of range")
	}
	*d = spanFlag(v)
	return nil
}

type pruneOptions struct {
	Keep   sandbox.Retention
	DryRun bool
	Output string
}

// The defaults of "bases prune".
const (
	pruneAge   = 7 * 24 * time.Hour
	pruneBytes = 20 << 30
)

// newBasesPrune makes the "bases prune" command.
func newBasesPrune(env *Env, run func(context.Context, *Env, pruneOptions) error) *cobra.Command {
	if run == nil {
		run = runPrune
	}
	var opts pruneOptions
	var all bool
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove bases that nobody has used for long",
		Long: `Prune removes bases that no sandbox was started from for --older-than, and then
the longest unused ones until the rest takes no more than --keep-bytes. Damaged
ones go in any case. A base that a sandbox or another base stands on stays.

The next run that needs a base which was removed makes it again. Only the forks
of a run that is under way would miss theirs: those of one that was paused for
longer than --older-than.

The clean-up (see: cleanup) removes bases that were not used for 30 days.` + baseHelp + exits(exitOK, exitFailed, exitUsage),
		Example: `  sandbox-temporal bases prune --dry-run
  sandbox-temporal bases prune --older-than 24h --keep-bytes 5GiB
  sandbox-temporal bases prune --all`,
		Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if all {
				for _, name := range []string{"older-than", "keep-bytes"} {
					if cmd.Flags().Changed(name) {
						return usage("Leave one of them out.", "--all and --%s are both given", name)
					}
				}
				opts.Keep = sandbox.Retention{}
			}
			return run(cmd.Context(), env, opts)
		},
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.Var(newSpanFlag(&opts.Keep.Age, pruneAge), "older-than", "remove what was not used for this `DURATION`, as 90m, 168h or 7d")
	fs.Var(newByteFlag(&opts.Keep.Bytes, pruneBytes), "keep-bytes", "keep at most this `SIZE` of them, as 500MB or 20GiB")
	fs.BoolVar(&all, "all", false, "remove all that are not in use")
	fs.BoolVar(&opts.DryRun, "dry-run", false, "only say what would be removed; bases that only those stand on would follow")
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runPrune(ctx context.Context, env *Env, opts pruneOptions) error {
	bases, err := storedBases(ctx, env)
	if err != nil {
		return err
	}
	gone := expired(bases, opts.Keep, env.Now())
	var errs []error
	if !opts.DryRun {
		gone, errs = removeExpired(ctx, env, opts.Keep)
	}
	if err := sayGone(env, gone, opts); err != nil {
		return err
	}
	return errors.Join(errs...)
}

// removeExpired removes one base at a time and looks again: what it stood on
// may be free then, and come before those that were used later.
func removeExpired(ctx context.Context, env *Env, keep sandbox.Retention) (gone []storedBase, errs []error) {
	stays := map[string]bool{}
	for {
		bases, err := storedBases(ctx, env)
		if err != nil {
			return gone, append(errs, err)
		}
		candidates := expired(bases, keep, env.Now())
		i := slices.IndexFunc(candidates, func(b storedBase) bool { return !stays[b.Key] })
		if i < 0 {
			return gone, errs
		}
		b := candidates[i]
		err = b.snap.RemoveBase(ctx, b.Key)
		switch {
		case err == nil:
			gone = append(gone, b)
		case ctx.Err() != nil:
			return gone, append(errs, ctx.Err())
		case fault.KindOf(err) != fault.Conflict: // somebody came just now
			errs = append(errs, err)
		}
		stays[b.Key] = true
	}
}

// expired are the bases that the retention does not keep, longest unused
// first.
func expired(bases []storedBase, keep sandbox.Retention, now time.Time) (gone []storedBase) {
	infos := make([]sandbox.BaseInfo, len(bases))
	for i, b := range bases {
		infos[i] = b.BaseInfo
	}
	for _, info := range keep.Expired(infos, now) {
		i := slices.IndexFunc(bases, func(b storedBase) bool { return b.Key == info.Key && b.Created.Equal(info.Created) })
		gone = append(gone, bases[i])
	}
	return gone
}

func sayGone(env *Env, gone []storedBase, opts pruneOptions) error {
	if opts.Output == "json" {
		return writeBases(env, gone)
	}
	var bytes int64
	for _, b := range gone {
		bytes += b.Bytes
		if _, err := fmt.Fprintf(env.Stdout, "%s  %s  %s\n", flat(b.Key), byteText(b.Bytes), flat(b.Labels[sandbox.LabelRepository])); err != nil {
			return err
		}
	}
	verb := "removed"
	if opts.DryRun {
		verb = "would be removed"
	}
	fmt.Fprintf(env.Stderr, "%s %s, %s\n", plural(len(gone), "base"), verb, byteText(bytes))
	return nil
}

// newBasesRemove makes the "bases rm" command.
func newBasesRemove(env *Env, run func(context.Context, *Env, string) error) *cobra.Command {
	if run == nil {
		run = runRemoveBase
	}
	return &cobra.Command{
		Use:   "rm KEY",
		Short: "Remove one base",
		Long: `Rm removes one base. KEY is its key, or the beginning of one that no other base
has, with or without "` + keyPrefix + `". A base that a sandbox or another base stands on
cannot be removed.` + baseHelp + exits(exitOK, exitFailed, exitUsage, exitNotFound),
		Example:           "  sandbox-temporal bases rm base-1a2b3c4d",
		Args:              args("KEY"),
		RunE:              func(cmd *cobra.Command, words []string) error { return run(cmd.Context(), env, words[0]) },
		ValidArgsFunction: completeBases(env),
	}
}

func runRemoveBase(ctx context.Context, env *Env, word string) error {
	bases, err := storedBases(ctx, env)
	if err != nil {
		return err
	}
	const hint = "See them with: " + program + " bases"
	var hits []storedBase
	for _, b := range bases {
		if b.Key == word {
			hits = []storedBase{b}
			break
		}
		if word != "" && (strings.HasPrefix(b.Key, word) || strings.HasPrefix(b.Key, keyPrefix+word)) {
			hits = append(hits, b)
		}
	}
	switch len(hits) {
	case 0:
		return fault.New("", fault.NotFound, "there is no base %q", word).Hinted(hint)
	case 1:
	default:
		return usage("Write more of the key. "+hint, "%s begin with %q", plural(len(hits), "base"), word)
	}
	b := hits[0]
	if err := b.snap.RemoveBase(ctx, b.Key); err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "%s\n", flat(b.Key))
	return err
}

// completeBases offers the keys of bases that are not in use.
func completeBases(env *Env) cobra.CompletionFunc {
	return func(cmd *cobra.Command, words []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		const none = cobra.ShellCompDirectiveNoFileComp
		if len(words) > 0 || env.configure(cmd, nil) != nil {
			return nil, none
		}
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		bases, err := storedBases(ctx, env)
		if err != nil {
			return nil, none
		}
		var keys []string
		for _, b := range bases {
			if b.Users == 0 && strings.HasPrefix(b.Key, toComplete) {
				keys = append(keys, flat(b.Key)+"\t"+flat(b.Labels[sandbox.LabelRepository]+" "+shortCommit(b.Labels[sandbox.LabelCommit])))
			}
		}
		return keys, none
	}
}
