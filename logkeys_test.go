package floors_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// spoken are the packages whose log lines people and programs search by run,
// fork and sandbox. Their keys are the constants of internal/logs. The
// supervisors in internal/sandbox write to a file of their own sandbox; the
// engine passes on what Temporal's server says in its own words.
var spoken = []string{"activities", "cli", "host", "orchestrator", "repo"}

// keysFrom says with which argument the keys of a line begin.
var keysFrom = map[string]int{
	"Debug": 1, "Info": 1, "Warn": 1, "Error": 1, "DebugContext": 2, "InfoContext": 2, "WarnContext": 2, "ErrorContext": 2, "Log": 3, "With": 0,
}

func TestKeysOfLogLinesAreConstants(t *testing.T) {
	seen := 0
	for _, name := range spoken {
		files, err := filepath.Glob(filepath.Join("internal", name, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			set := token.NewFileSet()
			f, err := parser.ParseFile(set, file, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(f, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				method, ok := call.Fun.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				from, known := keysFrom[method.Sel.Name]
				if !known || !logger(method.X) {
					return true
				}
				for i := from; i < len(call.Args); i += 2 {
					seen++
					if _, raw := call.Args[i].(*ast.BasicLit); raw {
						t.Errorf("%s: the key is no constant of internal/logs", set.Position(call.Args[i].Pos()))
					}
				}
				return true
			})
		}
	}
	if seen < 20 {
		t.Errorf("only %d keys were looked at", seen)
	}
}

// logger says whether an expression is one, by how they are called here.
func logger(e ast.Expr) bool {
	switch x := e.(type) {
	case *ast.Ident:
		return x.Name == "log"
	case *ast.SelectorExpr:
		return x.Sel.Name == "log" || x.Sel.Name == "Logger"
	case *ast.CallExpr:
		f, ok := x.Fun.(*ast.SelectorExpr)
		return ok && slices.Contains([]string{"about", "With", "GetLogger"}, f.Sel.Name)
	}
	return false
}
