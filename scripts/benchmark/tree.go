package main

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
)

// treeWord is the first argument with which this program writes a tree instead
// of measuring: it runs in a sandbox then, to make a base.
const treeWord = "tree"

// writeTree writes a repository of the given number of files as a stream for
// "git fast-import": always the same, byte for byte. Files lie 20 in a folder
// and 20 folders in a folder. Their sizes are those of source code: most of 1
// to 8 KiB, one in fifty of 64 KiB, about 6 KiB in the middle.
func writeTree(w io.Writer, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	b := bufio.NewWriterSize(w, 1<<20)
	random := rand.New(rand.NewPCG(1, 2))
	fmt.Fprint(b, "commit refs/heads/main\ncommitter Bench <bench@example.com> 1750000000 +0000\ndata 5\ntree\n\n")
	var text []byte
	for i := range n {
		size := 1024 + random.IntN(7*1024)
		if i%50 == 0 {
			size = 64 << 10
		}
		text = text[:0]
		for len(text) < size {
			text = append(text, "func "...)
			for range 3 {
				text = strconv.AppendUint(append(text, ' '), random.Uint64()&0xffffff, 36)
			}
			text = append(text, " {\n\treturn nil\n}\n"...)
		}
		fmt.Fprintf(b, "M 644 inline d%03d/e%02d/f%02d.go\ndata %d\n", i/400, i/20%20, i%20, len(text))
		b.Write(text) //nolint:errcheck // Flush returns its error
		b.WriteByte('\n')
	}
	return b.Flush()
}

// treeScript makes the tree in the folder it runs in. The pause lets the times
// of the files and of git's index differ: else the next git status must read
// every file again.
const treeScript = `set -e
git init -q -b main .
git config core.fsyncMethod batch
"$TREE" tree "$FILES" | git fast-import --quiet
git checkout -q -f main
sleep 1.1
git status --porcelain
`

// cacheScript has git remember what is in the folders, as that of a base does.
const cacheScript = `
git update-index --untracked-cache
git status --porcelain
git update-index --force-write-index
`
