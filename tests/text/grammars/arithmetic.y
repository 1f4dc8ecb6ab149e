%start sum
%left '+' '-'
%left '*' '/'
%%
sum : sum '+' product { $$ = $1 + $3; }
    | sum '-' product { $$ = $1 - $3; }
    | product
    ;
product : product '*' factor | product '/' factor | factor ;
factor : NUMBER | '(' sum ')' | '-' factor ;
NUMBER : /[0-9]+(\.[0-9]+)?/ ;
SKIP : /[ \t]+/ ;
