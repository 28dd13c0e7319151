#!/bin/sh
# start.sh brings the databases to the schema of this version of Temporal and
# becomes the server. It is run at every start: what is there already stays.
#
# Needs temporal-server and temporal-sql-tool on the PATH, and from the
# environment POSTGRES_SEEDS (host), DB_PORT, POSTGRES_USER, POSTGRES_PWD. The
# server's own embedded configuration reads the same names, and those of its
# ports; see "temporal-server render-config".
set -eu
: "${POSTGRES_SEEDS:?the host of the PostgreSQL server}" "${POSTGRES_USER:?}" "${POSTGRES_PWD:?}"
export DB=postgres12 DB_PORT="${DB_PORT:-5432}" DBNAME="${DBNAME:-temporal}" VISIBILITY_DBNAME="${VISIBILITY_DBNAME:-temporal_visibility}"
# The tool takes these from the environment, so the password is in no argument list.
export SQL_PLUGIN=$DB SQL_HOST=$POSTGRES_SEEDS SQL_PORT=$DB_PORT SQL_USER=$POSTGRES_USER SQL_PASSWORD=$POSTGRES_PWD

for pair in "$DBNAME postgresql/v12/temporal" "$VISIBILITY_DBNAME postgresql/v12/visibility"; do
  SQL_DATABASE=${pair% *}
  export SQL_DATABASE
  temporal-sql-tool create-database
  temporal-sql-tool setup-schema --version 0.0
  temporal-sql-tool update-schema --schema-name "${pair#* }"
done

exec temporal-server --allow-no-auth start
