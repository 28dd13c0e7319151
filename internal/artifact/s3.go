package artifact

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/logging"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"gocloud.dev/blob"
	"gocloud.dev/blob/s3blob"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const (
	s3Attempts = 5                // of one request, with growing pauses in between
	s3Answer   = 30 * time.Second // the longest that a server may be silent once it has a request
	s3GiveUp   = 10 * time.Second // the longest that giving up an upload takes
)

const (
	hintURL    = "Write it as s3://bucket/folder?region=eu-west-1; for a server that is not Amazon's, add &endpoint=https://host:port."
	hintKeys   = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for temporary ones AWS_SESSION_TOKEN too), or AWS_PROFILE, to keys that may list, read, write and remove objects of the bucket."
	hintBucket = "Make the bucket, or name another one with SANDBOX_TEMPORAL_ARTIFACTS."
	hintRegion = "Name the bucket's own region with ?region= in SANDBOX_TEMPORAL_ARTIFACTS, or with AWS_REGION."
	hintServer = "Is the server of the artifact store running, and can this host reach it?"
)

// openS3 opens "s3://bucket/folder" on a server that speaks S3. What is in the
// folder is all that the store sees. The parameters:
//
//	region      where the bucket is; else what AWS_REGION or a profile says
//	endpoint    the server, when it is not Amazon's
//	path_style  whether the bucket stands in the path of a request and not in
//	            the name of its host; true with an endpoint, else false
//	prefix      the folder, as an alternative to the path
//	profile     a profile in the files of the AWS CLI
func openS3(ctx context.Context, u *url.URL, o settings) (*Store, error) {
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil || u.Host == "" || u.Port() != "" || u.Fragment != "" {
		return nil, fault.New("", fault.Invalid, "the URL names no bucket").Hinted(hintURL)
	}
	known := []string{"region", "endpoint", "path_style", "prefix", "profile"}
	for name, values := range q {
		if !slices.Contains(known, name) || len(values) != 1 {
			return nil, fault.New("", fault.Invalid, "%q is no parameter of s3://, or stands there twice", name).
				Hinted("There are: %s.", strings.Join(known, ", "))
		}
	}
	path, prefix := strings.Trim(u.Path, "/"), strings.Trim(q.Get("prefix"), "/")
	folder := cmp.Or(path, prefix)
	if folder != "" && (path != "" && prefix != "" || checkKey(folder) != nil) {
		return nil, fault.New("", fault.Invalid, "%q is no folder of a bucket", folder).
			Hinted("Use letters, digits and ._@+=- between slashes, and say it once.")
	}
	endpoint := q.Get("endpoint")
	if endpoint != "" {
		e, err := url.Parse(endpoint)
		if err != nil || e.Scheme != "http" && e.Scheme != "https" || e.Host == "" || e.User != nil || e.RawQuery != "" {
			return nil, fault.New("", fault.Invalid, "the endpoint is no address").Hinted("Use an address such as https://minio.example.com:9000.")
		}
	}
	pathStyle := endpoint != ""
	if q.Has("path_style") {
		if pathStyle, err = strconv.ParseBool(q.Get("path_style")); err != nil {
			return nil, fault.New("", fault.Invalid, "path_style=%s", q.Get("path_style")).Hinted("Use path_style=true or path_style=false.")
		}
	}
	cfg, err := awsConfig(ctx, q, o)
	if err != nil {
		return nil, err
	}
	client := s3.NewFromConfig(cfg, func(so *s3.Options) {
		if endpoint != "" {
			so.BaseEndpoint = &endpoint
		}
		so.UsePathStyle = pathStyle || so.BaseEndpoint != nil && !q.Has("path_style")
		so.APIOptions = append(so.APIOptions, giveUpAnyway)
		if so.BaseEndpoint != nil {
			so.APIOptions = append(so.APIOptions, signLess)
		}
	})
	bucket, err := s3blob.OpenBucket(ctx, client, u.Host, &s3blob.Options{RequestChecksumCalculation: cfg.RequestChecksumCalculation})
	if err != nil {
		return nil, fault.New("", fault.Invalid, "%w", err).Hinted(hintURL)
	}
	if folder != "" {
		folder += "/"
		bucket = blob.PrefixedBucket(bucket, folder)
	}
	return &Store{bucket: bucket, drop: func(ctx context.Context, key string) error {
		// The bucket's own Delete asks first whether there is something.
		_, err := client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &u.Host, Key: aws.String(folder + key)})
		return err
	}}, nil
}

// awsConfig gathers what the SDK is to know. It asks no server.
func awsConfig(ctx context.Context, q url.Values, o settings) (aws.Config, error) {
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.ResponseHeaderTimeout = s3Answer
		t.MaxIdleConnsPerHost = 100 // as many agents as one worker has
	})
	load := []func(*config.LoadOptions) error{
		config.WithHTTPClient(client),
		config.WithLogger(logging.Nop{}), // it would write past our log; what matters is in the errors
		config.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(so *retry.StandardOptions) {
				so.MaxAttempts = s3Attempts
				so.RateLimiter = ratelimit.None // one agent's trouble is not another's
				if o.pause != nil {
					so.Backoff = retry.BackoffDelayerFunc(func(attempt int, _ error) (time.Duration, error) { return o.pause(attempt), nil })
				}
			})
		}),
		// Many servers that are not Amazon's do not know the checksums that the
		// SDK would add to every request.
		config.WithRequestChecksumCalculation(aws.RequestChecksumCalculationWhenRequired),
		config.WithResponseChecksumValidation(aws.ResponseChecksumValidationWhenRequired),
	}
	if region := q.Get("region"); region != "" {
		load = append(load, config.WithRegion(region))
	}
	if profile := q.Get("profile"); profile != "" {
		load = append(load, config.WithSharedConfigProfile(profile))
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return cfg, fault.New("", fault.Invalid, "%w", err).Hinted("Correct the files of the AWS CLI, or AWS_PROFILE, AWS_CONFIG_FILE and their like.")
	}
	if cfg.Region == "" {
		if q.Get("endpoint") == "" {
			return cfg, fault.New("", fault.Invalid, "the region of the bucket is not known").Hinted(hintRegion)
		}
		cfg.Region = "us-east-1" // what such servers take requests to be signed for
	}
	cfg.Credentials = lent{o.keys, cfg.Credentials}
	return cfg, nil
}

// lent are the keys that the store was lent, else those of the usual places.
type lent struct {
	keys  func() Keys
	usual aws.CredentialsProvider
}

func (l lent) Retrieve(ctx context.Context) (aws.Credentials, error) {
	if l.keys != nil {
		if k := l.keys(); k.ID != "" {
			return aws.Credentials{AccessKeyID: k.ID, SecretAccessKey: k.Secret, SessionToken: k.Session, Source: "lent"}, nil
		}
	}
	c, err := l.usual.Retrieve(ctx)
	if err != nil && ctx.Err() == nil {
		err = fault.New("", fault.Denied, "there are no keys for the artifact store: %w", err).Hinted(hintKeys)
	}
	return c, err
}

// signLess keeps Accept-Encoding out of the signature: Google's servers, and
// some proxies before others, change it before they look at the signature.
func signLess(stack *middleware.Stack) error {
	const header = "Accept-Encoding"
	type kept struct{}
	before := middleware.FinalizeMiddlewareFunc("KeepAcceptEncoding", func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
		if req, ok := in.Request.(*smithyhttp.Request); ok {
			ctx = middleware.WithStackValue(ctx, kept{}, req.Header.Get(header))
			req.Header.Del(header)
		}
		return next.HandleFinalize(ctx, in)
	})
	after := middleware.FinalizeMiddlewareFunc("GiveAcceptEncoding", func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
		req, ok := in.Request.(*smithyhttp.Request)
		if value, had := middleware.GetStackValue(ctx, kept{}).(string); ok && had && value != "" {
			req.Header.Set(header, value)
		}
		return next.HandleFinalize(ctx, in)
	})
	if err := stack.Finalize.Insert(before, "Signing", middleware.Before); err != nil {
		return err
	}
	return stack.Finalize.Insert(after, "Signing", middleware.After)
}

// giveUpAnyway lets an upload in parts be given up also when nobody waits for
// it any more: the parts cost money, and no listing of objects shows them.
func giveUpAnyway(stack *middleware.Stack) error {
	return stack.Initialize.Add(middleware.InitializeMiddlewareFunc("GiveUpAnyway", func(ctx context.Context, in middleware.InitializeInput, next middleware.InitializeHandler) (middleware.InitializeOutput, middleware.Metadata, error) {
		if _, ok := in.Parameters.(*s3.AbortMultipartUploadInput); ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), s3GiveUp)
			defer cancel()
		}
		return next.HandleInitialize(ctx, in)
	}), middleware.Before)
}

// answered gives what an S3 server said, or that it said nothing, its kind. It
// is nil for an error of anything else. The kinds of gocloud.dev are not
// asked: up to v0.46 they take any error for NotFound that has "301" in its
// text, where the random id of the request stands.
func answered(err error) error {
	var known *fault.Error
	if errors.As(err, &known) && known.Kind != "" { // no keys
		return &fault.Error{Kind: known.Kind, Err: known.Err, Hint: known.Hint}
	}
	res, ok := errors.AsType[*smithyhttp.ResponseError](err)
	if !ok || res.HTTPStatusCode() == 0 {
		if sent, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
			return fault.New("", fault.Unavailable, "the server does not answer: %w", sent.Err).Hinted(hintServer)
		}
		return nil
	}
	status := res.HTTPStatusCode()
	said := http.StatusText(status)
	code := ""
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		code = api.ErrorCode()
		said = cmp.Or(api.ErrorMessage(), said)
	}
	e := fault.New("", fault.Internal, "the server says %d %s: %s", status, code, said)
	switch {
	case code == "NoSuchBucket":
		e.Kind, e.Hint = fault.Invalid, hintBucket
	case status == http.StatusMovedPermanently, status == http.StatusTemporaryRedirect, code == "AuthorizationHeaderMalformed":
		e.Kind, e.Hint = fault.Invalid, hintRegion
	case status == http.StatusNotFound:
		e.Kind = fault.NotFound
	case code == "RequestTimeTooSkewed":
		e.Kind, e.Hint = fault.Denied, "Set the clock of this host."
	case status == http.StatusUnauthorized, status == http.StatusForbidden, code == "ExpiredToken", code == "InvalidToken", code == "TokenRefreshRequired":
		e.Kind, e.Hint = fault.Denied, hintKeys
	case status >= 500, status == http.StatusTooManyRequests, status == http.StatusRequestTimeout, code == "RequestTimeout", code == "SlowDown":
		e.Kind, e.Hint = fault.Unavailable, "The artifact store is overloaded or down: try again later."
	}
	return e
}
