package sandbox

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
	"testing"
	"time"
)

// TestEveryCapabilityIsInTheTable reads the interfaces that a provider may
// implement from the source: one that is added there is missed here.
func TestEveryCapabilityIsInTheTable(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "capability.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	table, err := parser.ParseFile(token.NewFileSet(), "table.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	ast.Inspect(table, func(n ast.Node) bool {
		if x, ok := n.(*ast.IndexExpr); ok {
			if fn, ok := x.X.(*ast.Ident); ok && fn.Name == "has" {
				shown[x.Index.(*ast.Ident).Name] = true
			}
		}
		return true
	})
	declared := 0
	for _, d := range file.Decls {
		gen, ok := d.(*ast.GenDecl)
		if !ok || gen.Tok != token.TYPE || !strings.Contains(strings.Join(strings.Fields(gen.Doc.Text()), " "), "is implemented by providers") {
			continue
		}
		declared++
		if name := gen.Specs[0].(*ast.TypeSpec).Name.Name; !shown[name] {
			t.Errorf("%s is in no line of Capabilities", name)
		}
	}
	if declared < 10 || declared != len(Capabilities()) {
		t.Errorf("%d capabilities are declared, %d shown", declared, len(Capabilities()))
	}
}

func TestCapabilitiesAreSeenThroughWrappers(t *testing.T) {
	var got []string
	for _, c := range Capabilities() {
		if c.Has(wrapper{lagging{}}) {
			got = append(got, c.Name)
		}
	}
	if strings.Join(got, " ") != "list_lag" {
		t.Errorf("%v", got)
	}
}

type wrapper struct{ Provider }

func (w wrapper) Unwrap() Provider { return w.Provider }

// lagging has one capability and nothing else.
type lagging struct{}

func (lagging) ListLag() time.Duration                                  { return time.Second }
func (lagging) Name() string                                            { return "lagging" }
func (lagging) Create(context.Context, Spec) (Ref, error)               { return Ref{}, nil }
func (lagging) Attach(context.Context, Ref) (Sandbox, error)            { return nil, nil }
func (lagging) Destroy(context.Context, Ref) error                      { return nil }
func (lagging) List(context.Context, map[string]string) ([]Info, error) { return nil, nil }
